"""The pipeline: one image, a prompt and drawn trajectories -> a video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from imageconductor.checkpoints.assembly import Assembly
from imageconductor.checkpoints.domain_adapter import DomainAdapter
from imageconductor.checkpoints.model_card import model_card, write_provenance
from imageconductor.checkpoints.model_folder import (
    SamplingDefaults,
    adapter_folder,
    load_companions,
    locate_model,
    read_sampling_defaults,
    save_gates,
    write_pipeline_code,
)
from imageconductor.conditioning import Trajectories
from imageconductor.config import check_finite
from imageconductor.models.adapters import attached_adapters, save_adapter
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.gated_attention import ObjectGates, SceneGates
from imageconductor.models.motion_unet import MotionUNet, TextToVideoUNet
from imageconductor.models.networks import (
    NETWORKS,
    Networks,
    is_text_to_video,
    load_network,
    single_progress_bar,
    tokenize,
    warn_of_cut,
)
from imageconductor.models.weights import find_weights, refuse_non_finite
from imageconductor.sampling.branches import Control
from imageconductor.sampling.denoising import (
    CALLBACK_TENSORS,
    StepCallback,
    as_generators,
    check_resume,
    denoise,
    mix_noise_priors,
)
from imageconductor.sampling.inputs import (
    CallInputs,
    Mix,
    Picture,
    build_conditions,
    check_inputs,
    choose_texts,
    parse_mix,
    parse_seeds,
)
from imageconductor.sampling.output import OUTPUT_TYPES, ImageConductorOutput, convert_frames
from imageconductor.sampling.residual_cache import ResidualCache


class ImageConductorPipeline(DiffusionPipeline, TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin):
    """Image-to-video generation whose camera or objects follow drawn trajectories.

    Args:
        vae: Autoencoder of single frames.
        text_encoder: CLIP text model.
        tokenizer: Its tokenizer.
        unet: AnimateDiff's UNet, or ModelScope's.
        image_controlnet: RGB SparseCtrl, for the first frame; None in a text-to-video model.
        motion_controlnet: For the trajectories, with the camera and the object LoRA attached; None likewise.
        scheduler: DDIM, or any diffusers scheduler whose `step` takes (prediction, t, sample).
        sampling_defaults: Fields of `SamplingDefaults`.
    """

    model_cpu_offload_seq = "text_encoder->vae->image_controlnet->motion_controlnet->unet"
    _callback_tensor_inputs = list(CALLBACK_TENSORS)  # noqa: RUF012
    _optional_components = ["image_controlnet", "motion_controlnet"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: MotionUNet | TextToVideoUNet,
        scheduler: Any,
        image_controlnet: ImageControlNet | None = None,
        motion_controlnet: MotionControlNet | None = None,
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
        self.object_gates: ObjectGates | None = None
        self.scene_gates: SceneGates | None = None
        self._cut_prompts: set[str] = set()
        self.provenance: dict[str, str] = {}  # texts that say where the weights come from, by file name

    # -- model folders

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> ImageConductorPipeline:
        """A pipeline from a model folder or a hub repository, with the LoRAs that lie in it.

        Args:
            folder: Local folder, or "organisation/name" on the hub; one of diffusers' TextToVideoSDPipeline, too.
            kwargs: As diffusers', e.g. `dtype`.

        Raises:
            FileNotFoundError: Neither a model folder nor a repository that can be reached, or a part is missing.
            ValueError: A part is damaged.
        """
        folder = locate_model(folder)
        defaults = read_sampling_defaults(folder)
        if is_text_to_video(Networks.check_folder(folder)):
            networks = Networks.load(folder)
            networks.to(kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32)
            return cls(**networks.parts, sampling_defaults=defaults)
        # transformers would else follow the files, diffusers not.
        kwargs["dtype"] = kwargs.pop("torch_dtype", kwargs.get("dtype", torch.float32))
        if "variant" not in kwargs:  # A part may have the weights of a variant alone.
            only = [name for name in NETWORKS.keys() - kwargs.keys() if find_weights(folder / name)[1] is not None]
            kwargs |= {name: load_network(name, folder / name, kwargs["dtype"]) for name in only}
        with single_progress_bar():
            pipe = super().from_pretrained(str(folder), **kwargs)
        load_companions(pipe, folder)
        return pipe

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', but this class is the one to load: the code in a model folder is not run."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, dict) and isinstance(config.get("_class_name"), list):
            config["_class_name"] = cls.__name__
        return config

    @classmethod
    def from_assembly(cls, assembly: Assembly) -> ImageConductorPipeline:
        """The pipeline of a recipe's parts."""
        pipe = cls(**assembly.networks.parts, sampling_defaults=assembly.sampling)
        pipe.domain_adapter, pipe.provenance = assembly.domain_adapter, assembly.provenance
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes a model folder: diffusers' parts, LoRAs as PEFT safetensors, gates, where all comes from, and a card.

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
        write_pipeline_code(folder)
        for name in sorted(attached_adapters(self.motion_controlnet)) if self.motion_controlnet else ():
            save_adapter(self.motion_controlnet, name, adapter_folder(folder, name))
        save_gates(folder, {"object_gates": self.object_gates, "scene_gates": self.scene_gates})
        if self.domain_adapter is not None:
            self.domain_adapter.save(folder)
        write_provenance(folder, self.provenance)

    def _upload_folder(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # diffusers has put an empty card in the place of ours.
        folder = Path(working_dir)
        (folder / "README.md").write_text(model_card(folder, self.provenance, repo_id))
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)

    def compile(self, **kwargs: Any) -> None:
        """Compiles the networks: the first call takes minutes longer, and so does one of another size or adapter.

        Args:
            kwargs: As `torch.compile`'s.
        """
        unet: Any = self.unet  # Sampling calls its halves, which `nn.Module.compile` does not reach.
        unet.encode, unet.decode = torch.compile(unet.encode, **kwargs), torch.compile(unet.decode, **kwargs)
        for network in filter(None, (self.image_controlnet, self.motion_controlnet)):
            network.compile(**kwargs)

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """This model's defaults: width, height, num_frames, fps, num_inference_steps, guidance_scale, ..."""
        return dict(self.config["sampling_defaults"])

    # -- parts of a call

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B, L, D); what the text encoder does not read of a prompt is warned of, once."""
        texts: Any = self.maybe_convert_prompt(list(prompts), self.tokenizer)
        tokens, left_out = tokenize(self.tokenizer, texts, self.text_encoder.config.max_position_embeddings)
        for prompt, words in zip(prompts, left_out, strict=True):
            if words and prompt not in self._cut_prompts:
                self._cut_prompts.add(prompt)
                warn_of_cut(prompt, words)
        return self.text_encoder(tokens.to(self._execution_device)).last_hidden_state

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, chunk_size: int = 16) -> Tensor:
        """Frames (B, T, 3, H, W) in [0, 1] float32 of latents (B, C, T, h, w), `chunk_size` frames at a time.

        Raises:
            ValueError: The VAE gives values that are not finite.
        """
        frames = latents.transpose(1, 2).flatten(0, 1).to(self.vae.dtype) / self.vae.config["scaling_factor"]
        decoded = torch.cat([self.vae.decode(chunk).sample.float() for chunk in frames.split(chunk_size)])
        refuse_non_finite(self, decoded, "decoding of the latents")
        return (decoded / 2 + 0.5).clamp(0, 1).unflatten(0, (latents.shape[0], latents.shape[2]))

    def prepare_latents(
        self,
        inputs: CallInputs,
        num_videos_per_prompt: int,
        generators: Sequence[torch.Generator] | None,
        latents: Tensor | None = None,
        noise_prior: tuple[Sequence[Tensor], float] | None = None,
        is_scaled: bool = False,
    ) -> Tensor:
        """Initial noise (B, C, T, h, w) float32 as the scheduler scales it, once its timesteps are set.

        Args:
            inputs: Of the call.
            num_videos_per_prompt: Videos of each condition.
            generators: One for each video, so that a video does not depend on its batch; None = torch's global one.
            latents: Noise of unit variance that is taken instead, once its shape is checked.
            noise_prior: As in the call, mixed in.
            is_scaled: The given latents are a sample of the scheduler's, which is returned as it is.

        Raises:
            ValueError: The shape of the latents is another.
        """
        count, device = inputs.count * num_videos_per_prompt, self._execution_device
        height, width = (side // self.vae_scale_factor for side in reversed(inputs.size))
        shape = (count, self.unet.config["in_channels"], inputs.num_frames, height, width)
        if latents is None:
            drawn = randn_tensor(shape, None if generators is None else list(generators), device, torch.float32)
        elif latents.shape == shape:
            drawn = latents.to(device, torch.float32)
        else:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        if not drawn.isfinite().all():
            raise ValueError("the given latents hold nan or infinite values")
        if noise_prior is not None:
            drawn = mix_noise_priors(drawn, *noise_prior, generators)
        return drawn if is_scaled else drawn * self.scheduler.init_noise_sigma

    @property
    def guidance_scale(self) -> float:
        """lambda_cfg of the call that runs; a callback may set `_guidance_scale`, and at most 1 turns guidance off."""
        return max(1.0, self._guidance_scale)

    @property
    def mix(self) -> Mix | None:
        """Weights of the motion controls in the call that runs, or None; a callback may set `_mix`, to None too."""
        return parse_mix(self._mix)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call that runs evaluates the negative prompt too."""
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the call that runs, each of which ends with the callback."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which leaves out the remaining steps."""
        return self._interrupt

    # -- the call

    @torch.no_grad()
    def __call__(
        self,
        image: Picture | Sequence[Picture] | None = None,
        trajectories: Trajectories | Sequence[Trajectories] | None = None,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] | None = None,
        control: Control | str | None = None,
        camera_free_scale: float | None = None,
        guidance_scale: float | None = None,
        trajectory_guidance_scale: float | None = None,
        mix: Mapping[Control, float] | Mapping[str, float] | None = None,
        num_inference_steps: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        noise_prior: tuple[Sequence[Tensor], float] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        eta: float = 0.0,
        decode_chunk_size: int = 16,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        residual_cache: ResidualCache | None = None,
        keep_latents: bool = False,
        resume_from: int | None = None,
    ) -> ImageConductorOutput | tuple[Any, ...]:
        """Videos that begin with the image and move along the trajectories.

        Several images, trajectories or prompts make several videos; one of a kind serves all.

        Args:
            image: First frame, cover-cropped to the size, or pictures by the number of their frame, {0: first,
                -1: last}. None leaves the image ControlNet out: text-to-video.
            trajectories: With as many frames as the video, drawn on a frame of any size, which is cropped as the image
                is. None leaves the motion ControlNet out.
            prompt: What the video shows.
            negative_prompt: What it does not show; None = the model's default, as below.
            control: "camera", "object", "mixed" (both LoRAs) or "base" (none).
            camera_free_scale: lambda_trajs of Eq. 5, with control "object"; None = plain classifier-free guidance.
            guidance_scale: lambda_cfg; at most 1 = off, as in diffusers' pipelines.
            trajectory_guidance_scale: Above 1 it extrapolates away from the video without the trajectories.
            mix: Weights of several motion controls at once, {"camera": 1.0, "object": 0.5}, in place of `control` and
                the two scales of the trajectories.
            num_inference_steps: Denoising steps.
            num_frames: T.
            height: Pixels, a multiple of the VAE scale factor.
            width: Pixels, a multiple of the VAE scale factor.
            num_videos_per_prompt: Videos of each condition; they share the ControlNets' work.
            generator: One for all videos, drawn from in turn, or one for each; also of the noise within steps.
            seed: In its place: one video of each condition for each of the numbers.
            latents: (B, C, T, h, w), initial noise of unit variance; the sample before the step with `resume_from`.
            noise_prior: Inverted noise (C, T, h, w) of clips, of which each video takes one, and its fraction p of the
                initial noise (MotionDirector).
            prompt_embeds: (P, L, D), text embeddings in place of the prompts.
            negative_prompt_embeds: (P, L, D), in place of the negative prompts.
            eta: DDIM's stochasticity.
            decode_chunk_size: Frames decoded at a time.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: Called as `f(pipe, step, timestep, tensors)`, diffusers' own too; what it returns
                replaces latents and embeddings. It may set `_interrupt = True`, `_guidance_scale` and `_mix` of `pipe`.
            callback_on_step_end_tensor_inputs: Names among `_callback_tensor_inputs` of the tensors passed to it. "x_0"
                is the estimate of the clean latents, "branch_x_0" a dict of those of each motion control alone, which
                costs evaluations; while `pipe._shows_branches` is False, which a callback may set, it is empty.
            residual_cache: Keeps ControlNet outputs for calls with other seeds, images or trajectories.
            keep_latents: Returns the sample before each step too, as `latents`.
            resume_from: Leaves out that many steps, with DDIM at eta 0 and others whose steps depend on the sample
                alone; `latents` are then an entry of those that `keep_latents` returned.

        Raises:
            ValueError: Arguments that do not fit the model or each other.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        seeds = parse_seeds(seed, generator, num_videos_per_prompt)
        num_videos_per_prompt = max(num_videos_per_prompt, len(seeds))
        scales = (camera_free_scale, guidance_scale, trajectory_guidance_scale)
        shape = (num_inference_steps, num_frames, (width, height))
        check_finite({"eta": eta})
        texts = choose_texts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        inputs = check_inputs(self, image, trajectories, *texts, control, *scales, *shape, mix)
        if seeds:
            generator = [torch.Generator().manual_seed(seed) for _ in range(inputs.count) for seed in seeds]
        callback = StepCallback.parse(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.scheduler.set_timesteps(inputs.num_inference_steps, device=self._execution_device)
        if resume_from is not None:
            check_resume(self.scheduler, resume_from, eta, latents, noise_prior)
        generators = as_generators(generator, inputs.count * num_videos_per_prompt)
        of_noise = (num_videos_per_prompt, generators, latents, noise_prior, resume_from is not None)
        noise = self.prepare_latents(inputs, *of_noise)
        self._guidance_scale, self._mix = inputs.guidance_scale, inputs.mix
        self._num_timesteps = len(self.scheduler.timesteps)
        self._interrupt, self._shows_branches = False, True
        conditions, kept = build_conditions(self, inputs), [] if keep_latents else None
        of_loop = (generators, eta, callback, residual_cache, resume_from or 0, kept)
        sample = denoise(self, noise, inputs, conditions, *of_loop)
        frames = sample if output_type == "latent" else self.decode_latents(sample, decode_chunk_size)
        self.maybe_free_model_hooks()
        output = ImageConductorOutput(frames=convert_frames(frames, output_type), latents=kept)
        return output if return_dict else output.to_tuple()
