"""The pipeline: one image, a prompt and drawn trajectories -> a video."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from imageconductor.checkpoints.domain_adapter import DomainAdapter
from imageconductor.checkpoints.model_card import model_card, read_provenance, write_provenance
from imageconductor.conditioning import (
    Trajectories,
    build_flow_map,
    encode_first_frame,
    first_frame_condition,
    to_pixels,
)
from imageconductor.models.adapters import (
    WEIGHTS_NAME,
    Adapter,
    adapter_parameters,
    attached_adapters,
    load_adapter,
    save_adapter,
)
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.motion_unet import MotionUNet
from imageconductor.sampling.branches import ADAPTERS, Conditions, Control, Text, guided_prediction, plan


@dataclass
class ImageConductorOutput(BaseOutput):
    """Videos.

    Attributes:
        frames: "np" (B, T, H, W, 3) in [0, 1]; "pt" (B, T, 3, H, W) in [0, 1]; "pil" lists of T images for each video;
            "latent" (B, C, T, h, w).
    """

    frames: Any


@dataclass(frozen=True)
class SamplingDefaults:
    """What a model does unasked; kept in its `model_index.json`. The values here are those of the published weights."""

    width: int = 384
    height: int = 256
    num_frames: int = 16
    fps: int = 8
    num_inference_steps: int = 25
    guidance_scale: float = 8.5  # paper C.1; the release's YAML says 7.5
    trajectory_guidance_scale: float = 1.0  # off, as in the paper and the release
    negative_prompt: str = "worst quality, low quality, letterboxed"
    control: str = "object"


class ImageConductorPipeline(DiffusionPipeline, TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin):
    """Image-to-video generation whose camera or objects follow drawn trajectories.

    Args:
        vae: Autoencoder of single frames.
        text_encoder: CLIP text model.
        tokenizer: Its tokenizer.
        unet: AnimateDiff's UNet.
        image_controlnet: RGB SparseCtrl, for the first frame.
        motion_controlnet: For the trajectories, with the camera and the object LoRA attached.
        scheduler: DDIM, or any diffusers scheduler whose `step` takes (prediction, t, sample).
        sampling_defaults: Fields of `SamplingDefaults`.
    """

    model_cpu_offload_seq = "text_encoder->vae->image_controlnet->motion_controlnet->unet"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: MotionUNet,
        image_controlnet: ImageControlNet,
        motion_controlnet: MotionControlNet,
        scheduler: Any,
        sampling_defaults: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            image_controlnet=image_controlnet,
            motion_controlnet=motion_controlnet,
            scheduler=scheduler,
        )
        self.register_to_config(sampling_defaults=asdict(SamplingDefaults(**(sampling_defaults or {}))))
        self.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.domain_adapter: DomainAdapter | None = None
        self.provenance: dict[str, str] = {}  # texts that say where the weights come from, by file name

    # -- model folders

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> ImageConductorPipeline:
        """A pipeline from a model folder or a hub repository, with the LoRAs that lie in it.

        Args:
            folder: Local folder, or "organisation/name" on the hub.
            kwargs: As diffusers', e.g. `torch_dtype`.

        Raises:
            FileNotFoundError: Neither a model folder nor a repository that can be reached.
        """
        folder = model_folder(folder)
        cls.read_sampling_defaults(folder)
        kwargs.setdefault("torch_dtype", torch.float32)  # transformers would else follow the files, diffusers not
        pipe = super().from_pretrained(str(folder), **kwargs)
        for adapter in Adapter:
            if (folder / f"{adapter.value}_lora" / WEIGHTS_NAME).is_file():
                load_adapter(pipe.motion_controlnet, adapter, folder / f"{adapter.value}_lora")
                for parameter in adapter_parameters(pipe.motion_controlnet, adapter).values():
                    parameter.data = parameter.data.to(pipe.unet.dtype)
        pipe.motion_controlnet.requires_grad_(False).eval()
        pipe.domain_adapter = DomainAdapter.load(folder) if DomainAdapter.is_in(folder) else None
        pipe.provenance = read_provenance(folder)
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes a model folder: diffusers' parts, the LoRAs as PEFT safetensors, where all comes from, and a card.

        Args:
            save_directory: The folder.
            kwargs: As diffusers', but for `push_to_hub`, which is a method of its own.

        Raises:
            ValueError: A style LoRA is attached, which diffusers would write in place of the weights.
        """
        if attached := sorted({name for names in self.get_list_adapters().values() for name in names}):
            raise ValueError(
                f"{', '.join(attached)} is attached to the model; fuse_lora() or unload_lora_weights() first"
            )
        if kwargs.pop("push_to_hub", False):
            raise ValueError("use push_to_hub(repository), which uploads the LoRAs too")
        folder = Path(save_directory)
        super().save_pretrained(folder, **kwargs)
        for adapter in sorted(attached_adapters(self.motion_controlnet)):
            save_adapter(self.motion_controlnet, adapter, folder / f"{adapter.value}_lora")
        if self.domain_adapter is not None:
            self.domain_adapter.save(folder)
        write_provenance(folder, self.provenance)

    def _upload_folder(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # diffusers has put an empty card in the place of ours.
        folder = Path(working_dir)
        (folder / "README.md").write_text(model_card(folder, self.provenance, repo_id))
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)

    @staticmethod
    def read_sampling_defaults(folder: str | Path) -> dict[str, Any]:
        """A model folder's defaults, read without loading a weight.

        Raises:
            FileNotFoundError: There is no model folder.
            ValueError: Its `model_index.json` is not one of this pipeline.
        """
        index = Path(folder) / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{folder} is no model folder (model_index.json is missing)")
        try:
            config = json.loads(index.read_text())
            defaults = SamplingDefaults(**config.get("sampling_defaults", {}))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not the index of an Image Conductor model: {error}") from error
        if "motion_controlnet" not in config:
            raise ValueError(f"{folder} is a {config.get('_class_name')} without a motion ControlNet")
        return asdict(defaults)

    @staticmethod
    def check_adapters(folder: str | Path, control: Control | str) -> None:
        """Raises FileNotFoundError if a model folder lacks a LoRA that the control needs; loads no weight."""
        for adapter in ADAPTERS[Control(control)]:
            path = Path(folder) / f"{adapter.value}_lora"
            if not (path / WEIGHTS_NAME).is_file():
                raise FileNotFoundError(
                    f"control {Control(control).value!r} needs the {adapter.value} LoRA, and {path} has none"
                )

    @staticmethod
    def check_shape(folder: str | Path, size: tuple[int, int], num_frames: int) -> None:
        """Raises ValueError if a model folder cannot make videos of (W, H) pixels and T frames; loads no weight."""
        try:
            vae, unet = (json.loads((Path(folder) / part / "config.json").read_text()) for part in ("vae", "unet"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} is not whole, there is no {error.filename}") from None
        _check_shape(size, num_frames, 2 ** (len(vae["block_out_channels"]) - 1), unet["motion_max_seq_length"])

    def compile(self, **kwargs: Any) -> None:
        """Compiles the networks: the first call takes minutes longer, and so does one of another size or adapter.

        Args:
            kwargs: As `torch.compile`'s.
        """
        unet: Any = self.unet  # Sampling calls its halves, which `nn.Module.compile` does not reach.
        unet.encode, unet.decode = torch.compile(unet.encode, **kwargs), torch.compile(unet.decode, **kwargs)
        self.image_controlnet.compile(**kwargs)
        self.motion_controlnet.compile(**kwargs)

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """What this model does unasked: width, height, num_frames, fps, num_inference_steps, guidance_scale, ..."""
        return dict(self.config["sampling_defaults"])

    # -- parts of a call

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B, L, D)."""
        length = self.text_encoder.config.max_position_embeddings
        tokens = self.tokenizer(
            self.maybe_convert_prompt(list(prompts), self.tokenizer),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self._execution_device)).last_hidden_state

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, chunk_size: int = 16) -> Tensor:
        """Frames (B, T, 3, H, W) in [0, 1] float32 of latents (B, C, T, h, w), `chunk_size` frames at a time."""
        frames = latents.transpose(1, 2).flatten(0, 1).to(self.vae.dtype) / self.vae.config["scaling_factor"]
        decoded = torch.cat([self.vae.decode(chunk).sample.float() for chunk in frames.split(chunk_size)])
        return (decoded / 2 + 0.5).clamp(0, 1).unflatten(0, (latents.shape[0], latents.shape[2]))

    def prepare_latents(
        self, shape: tuple[int, ...], generators: torch.Generator | Sequence[torch.Generator] | None, device: Any
    ) -> Tensor:
        """Initial noise (B, C, T, h, w), drawn video by video, so that a video does not depend on its batch."""
        sources = generators if isinstance(generators, Sequence) else [generators] * shape[0]
        if len(sources) != shape[0]:
            raise ValueError(f"{shape[0]} videos need as many generators, got {len(sources)}")
        noise = [
            randn_tensor((1, *shape[1:]), generator=source, device=device, dtype=torch.float32) for source in sources
        ]
        return torch.cat(noise) * self.scheduler.init_noise_sigma

    # -- the call

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | Sequence[Image.Image],
        trajectories: Trajectories | Sequence[Trajectories] | None = None,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] | None = None,
        control: Control | str | None = None,
        camera_free_scale: float | None = None,
        guidance_scale: float | None = None,
        trajectory_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        decode_chunk_size: int = 16,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImageConductorOutput | tuple[Any]:
        """Videos that begin with the image and move along the trajectories.

        Several images, trajectories or prompts make several videos; one of a kind serves all.

        Args:
            image: First frame, cover-cropped to the size.
            trajectories: With as many frames as the video; drawn on a frame of any size, fitted as the image is. None
                leaves the motion ControlNet out.
            prompt: What the video shows.
            negative_prompt: What it does not; None = the model's default.
            control: "camera", "object", "mixed" (both LoRAs) or "base" (none).
            camera_free_scale: lambda_trajs of Eq. 5, with control "object"; None = plain classifier-free guidance.
            guidance_scale: lambda_cfg, 1 = off.
            trajectory_guidance_scale: Above 1 it extrapolates away from the video without the trajectories.
            num_inference_steps: Denoising steps.
            num_frames: T.
            height: Pixels, a multiple of the autoencoder's factor.
            width: Likewise.
            num_videos_per_prompt: Videos of each condition; they share the ControlNets' work.
            generator: One for all videos, drawn from in turn, or one for each.
            latents: (B, C, T, h, w), the initial noise, instead of drawing it.
            eta: DDIM's stochasticity.
            decode_chunk_size: Frames decoded at a time.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: Called as `f(pipe, step, timestep, {"latents": ...})`; may return new latents.
            callback_on_step_end_tensor_inputs: Names passed to the callback; "latents" alone is offered.

        Raises:
            ValueError: Arguments that do not fit the model or each other.
        """
        defaults = SamplingDefaults(**self.sampling_defaults)
        width, height = width or defaults.width, height or defaults.height
        num_frames = num_frames or defaults.num_frames
        steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        if trajectory_guidance_scale is None:
            trajectory_guidance_scale = defaults.trajectory_guidance_scale
        negative_prompt = defaults.negative_prompt if negative_prompt is None else negative_prompt
        control = _control(defaults.control if control is None else control)
        images, drawn = _as_list(image), [] if trajectories is None else _as_list(trajectories)
        prompts, negatives = _as_list(prompt), _as_list(negative_prompt)
        self._check(width, height, num_frames, steps, num_videos_per_prompt, output_type)
        branches = plan(control, scale, camera_free_scale, trajectory_guidance_scale, has_trajectories=bool(drawn))
        if drawn:
            self._check_trajectories(drawn, num_frames, control)

        count = max(map(len, (images, drawn, prompts, negatives)))
        for name, values in {"image": images, "prompt": prompts, "negative_prompt": negatives}.items():
            _check_count(name, values, count)
        device, dtype = self._execution_device, self.unet.dtype
        texts: dict[Text, Tensor] = {
            "null": self.encode_prompt(_broadcast(negatives, count)).to(dtype),
            "prompt": self.encode_prompt(_broadcast(prompts, count)).to(dtype),
        }
        pixels = torch.cat([to_pixels(value, (width, height)) for value in images])
        latent = encode_first_frame(self.vae, pixels, device=device).to(device, dtype)
        first_frame, mask = first_frame_condition(latent.expand(count, -1, -1, -1), num_frames)
        conditions = Conditions(texts, first_frame, mask, self._flow(drawn, (width, height), count))

        shape = (
            count * num_videos_per_prompt,
            self.unet.config["in_channels"],
            num_frames,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if latents is None:
            latents = self.prepare_latents(shape, generator, device)
        elif latents.shape != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        sample = latents.to(device, torch.float32)

        self.scheduler.set_timesteps(steps, device=device)
        accepted = inspect.signature(self.scheduler.step).parameters.keys()
        step_arguments = {"eta": eta} if "eta" in accepted else {}
        with cast("Any", self).progress_bar(total=steps) as bar:
            for index, t in enumerate(self.scheduler.timesteps):
                x_t = self.scheduler.scale_model_input(sample, t).to(dtype)
                prediction = guided_prediction(
                    self.unet, self.image_controlnet, self.motion_controlnet, branches, conditions, x_t, t
                )
                sample = self.scheduler.step(prediction.float(), t, sample, **step_arguments, return_dict=False)[0]
                if callback_on_step_end is not None:
                    offered = {name: sample for name in callback_on_step_end_tensor_inputs if name == "latents"}
                    changed = callback_on_step_end(self, index, t, offered)
                    sample = (changed or {}).get("latents", sample)
                bar.update()

        frames = sample if output_type == "latent" else self.decode_latents(sample, decode_chunk_size)
        self.maybe_free_model_hooks()
        output = _convert(frames, output_type)
        return ImageConductorOutput(frames=output) if return_dict else (output,)

    def _flow(self, drawn: list[Trajectories], size: tuple[int, int], count: int) -> Tensor | None:
        if not drawn:
            return None
        _check_count("trajectories", drawn, count)
        convention = self.motion_controlnet.flow_convention
        device, dtype = self._execution_device, self.motion_controlnet.dtype
        flows = [build_flow_map(one.cover_crop(size), convention, device) for one in drawn]
        return torch.cat(flows).to(dtype).expand(count, -1, -1, -1, -1)

    def _check(self, width: int, height: int, num_frames: int, steps: int, videos: int, output_type: str) -> None:
        _check_shape((width, height), num_frames, self.vae_scale_factor, self.unet.config["motion_max_seq_length"])
        if steps < 1 or videos < 1:
            raise ValueError(f"num_inference_steps and num_videos_per_prompt must be at least 1, got {steps}, {videos}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")

    def _check_trajectories(self, drawn: list[Trajectories], num_frames: int, control: Control) -> None:
        for one in drawn:
            if one.num_frames != num_frames:
                raise ValueError(f"the video has {num_frames} frames, its trajectories {one.num_frames}")
        if missing := set(ADAPTERS[control]) - attached_adapters(self.motion_controlnet):
            names = " and ".join(sorted(adapter.value for adapter in missing))
            raise ValueError(f"control {control.value!r} needs the {names} LoRA, which this model does not have")


def model_folder(name: str | Path) -> Path:
    """Local folder of a model given by path or by "organisation/name", which is downloaded once.

    Raises:
        FileNotFoundError: Neither exists, or the hub cannot be reached.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or len(path.parts) != 2 or path.parent.is_dir():
        raise FileNotFoundError(f"no model folder at {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"no model folder at {name}, and the hub did not give one: {reason}") from error


def _check_shape(size: tuple[int, int], num_frames: int, factor: int, longest: int) -> None:
    width, height = size
    if width % factor or height % factor or min(size) < factor:
        raise ValueError(f"width and height must be multiples of {factor}, got {width} x {height}")
    if not 1 <= num_frames <= longest:
        raise ValueError(f"num_frames must be 1..{longest} for these motion modules, got {num_frames}")


def _control(value: Control | str) -> Control:
    try:
        return Control(value)
    except ValueError:
        raise ValueError(f"control must be one of {', '.join(c.value for c in Control)}, got {value!r}") from None


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check_count(name: str, values: list[Any], count: int) -> None:
    if len(values) not in (1, count):
        raise ValueError(f"{name}: expected 1 or {count} of them, got {len(values)}")


def _broadcast(values: list[Any], count: int) -> list[Any]:
    return values * count if len(values) == 1 else values


def _convert(frames: Tensor, output_type: str) -> Any:
    if output_type in ("latent", "pt"):
        return frames
    array = frames.permute(0, 1, 3, 4, 2).cpu().numpy()
    if output_type == "np":
        return array
    return [[Image.fromarray(np.round(frame * 255).astype(np.uint8)) for frame in video] for video in array]
