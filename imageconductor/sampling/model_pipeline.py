"""The networks of a model as a diffusers pipeline: model folders, placement, compilation, text and pixels."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
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
from imageconductor.diffusion.latents import unscale_latents
from imageconductor.files import write_text
from imageconductor.models.adapters import attached_adapters, save_adapter
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.denoiser import Denoiser
from imageconductor.models.gated_attention import ObjectGates, SceneGates
from imageconductor.models.motion_unet import MotionUNet, TextToVideoUNet
from imageconductor.models.networks import (
    GATES,
    NETWORKS,
    Networks,
    is_text_to_video,
    load_network,
    load_scheduler,
    single_progress_bar,
    tokenize,
    warn_of_cut,
)
from imageconductor.models.weights import find_weights, refuse_non_finite

if TYPE_CHECKING:
    from typing_extensions import Self

_OF_THE_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_BESIDE_THE_PARTS = ("sampling_defaults", "domain_adapter", "provenance", "folded", "lora_folders")


class ModelPipeline(DiffusionPipeline, TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin):
    """The networks of a model, its files, and what text encoder and autoencoder do.

    Args:
        vae: Autoencoder of single frames.
        text_encoder: CLIP text model.
        tokenizer: Its tokenizer.
        unet: AnimateDiff's UNet, or ModelScope's.
        image_controlnet: RGB SparseCtrl, for the first frame; None in a text-to-video model.
        motion_controlnet: For the trajectories, with the camera and the object LoRA attached; None likewise.
        scheduler: DDIM, or any diffusers scheduler whose `step` takes (prediction, t, sample).
        object_gates: For boxes; None in a model without them.
        scene_gates: For the first frame, beside `image_controlnet` or in its place; None in a model without them.
        sampling_defaults: Fields of `SamplingDefaults`.
        domain_adapter, provenance, folded, lora_folders: What a model folder holds besides, as the attributes below
            say; `components` has them all, so that a pipeline of the same parts can be saved as this one.
    """

    model_cpu_offload_seq = "text_encoder->vae->image_controlnet->motion_controlnet->unet"
    _optional_components = ["image_controlnet", "motion_controlnet", *GATES]  # noqa: RUF012
    _exclude_from_cpu_offload = list(GATES)  # noqa: RUF012  # They act inside the UNet, which would send them away.

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: MotionUNet | TextToVideoUNet,
        scheduler: Any,
        image_controlnet: ImageControlNet | None = None,
        motion_controlnet: MotionControlNet | None = None,
        object_gates: ObjectGates | None = None,
        scene_gates: SceneGates | None = None,
        sampling_defaults: dict[str, Any] | None = None,
        domain_adapter: DomainAdapter | None = None,
        provenance: dict[str, str] | None = None,
        folded: list[str] | None = None,
        lora_folders: dict[str, Path] | None = None,
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
            **dict.fromkeys(GATES),  # so that no file of diffusers' names them: a folder loads without them, too
        )
        self.object_gates, self.scene_gates = object_gates, scene_gates
        self.register_to_config(sampling_defaults=asdict(SamplingDefaults(**(sampling_defaults or {}))))
        self.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.domain_adapter = domain_adapter
        self._cut_prompts: set[str] = set()
        self.provenance = provenance or {}  # texts that say where the weights come from, by file name
        self.folded = folded or []  # LoRAs of a job that are in the weights
        self.lora_folders = lora_folders or {}  # of the model's LoRAs of the UNet, which are not attached, by name

    # -- model folders

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> Self:
        """A pipeline from a model folder or a hub repository, with the LoRAs that lie in it.

        Args:
            folder: Local folder, or "organisation/name" on the hub; one of diffusers' TextToVideoSDPipeline, too.
            kwargs: As diffusers', e.g. `dtype`, `revision`, or parts that are taken instead of the folder's. Of
                `sampling_defaults` those that are left out are the folder's. One of TextToVideoSDPipeline takes
                `dtype`, parts and `sampling_defaults`.

        Raises:
            FileNotFoundError: Neither a model folder nor a repository that can be reached, or a part is missing.
            ValueError: A part is damaged, UNet and ControlNets differ in dtype, or a text-to-video model takes no such
                argument.
        """
        folder = locate_model(folder, **{name: kwargs.pop(name) for name in _OF_THE_HUB if name in kwargs})
        defaults = read_sampling_defaults(folder) | (kwargs.pop("sampling_defaults", None) or {})
        # transformers would else follow the files, diffusers not.
        dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None)) or torch.float32
        if is_text_to_video(Networks.check_folder(folder)):
            parts = {field.name: kwargs.pop(field.name) for field in fields(Networks) if field.name in kwargs}
            if kwargs or isinstance(dtype, dict):
                unknown = ", ".join(kwargs) or f"dtype={dtype}"
                raise ValueError(
                    f"{folder} is a text-to-video model, which takes one dtype, parts and sampling_defaults, and not "
                    f"{unknown}; leave it out"
                )
            loaded = Networks.load(folder, dtype).parts | {"scheduler": load_scheduler(folder)}
            pipe = cls(**(loaded | parts), sampling_defaults=defaults)
            load_companions(pipe, folder)
            return pipe
        if "variant" not in kwargs:  # A part may have the weights of a variant alone.
            only = [name for name in NETWORKS.keys() - kwargs.keys() if find_weights(folder / name)[1] is not None]
            kwargs |= {name: load_network(name, folder / name, _dtype_of(name, dtype)) for name in only}
        with single_progress_bar():
            pipe = super().from_pretrained(str(folder), dtype=dtype, sampling_defaults=defaults, **kwargs)
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
    def from_assembly(cls, assembly: Assembly) -> Self:
        """The pipeline of a recipe's parts."""
        return cls(
            **assembly.networks.parts,
            sampling_defaults=assembly.sampling,
            domain_adapter=assembly.domain_adapter,
            provenance=assembly.provenance,
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes a model folder: diffusers' parts, all LoRAs, gates, where all comes from, and a card.

        Args:
            save_directory: The folder.
            kwargs: As diffusers', but for `push_to_hub`, which is a method of its own.

        Raises:
            ValueError: A style LoRA is attached, which diffusers would write in place of the weights, or LoRAs of a job
                are folded into the weights.
        """
        if self.folded:
            raise ValueError(
                f"this pipeline was loaded for a job, whose LoRAs ({', '.join(self.folded)}) are in its weights; load "
                "the model by from_pretrained to save it"
            )
        if attached := sorted({name for names in self.get_list_adapters().values() for name in names}):
            raise ValueError(
                f"{', '.join(attached)} is attached to the model; unload_lora_weights() first, after fuse_lora() if it "
                "shall stay in the weights"
            )
        if kwargs.pop("push_to_hub", False):
            raise ValueError("use push_to_hub(repository), which uploads the LoRAs too")
        folder = Path(save_directory)
        super().save_pretrained(folder, **kwargs)
        write_pipeline_code(folder)
        for name in sorted(attached_adapters(self.motion_controlnet)) if self.motion_controlnet else ():
            save_adapter(self.motion_controlnet, name, adapter_folder(folder, name))
        save_gates(folder, {name: getattr(self, name) for name in GATES})
        for name, source in self.lora_folders.items():
            if source.resolve() != (folder / name).resolve():
                shutil.copytree(source, folder / name, dirs_exist_ok=True)
        if self.domain_adapter is not None:
            self.domain_adapter.save(folder)
        write_provenance(folder, self.provenance)

    def _upload_folder(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # diffusers has put an empty card in the place of ours.
        folder = Path(working_dir)
        write_text(folder / "README.md", model_card(folder, self.provenance, repo_id))
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
    def components(self) -> dict[str, Any]:
        """What `__init__` takes, for another pipeline of the same parts."""
        return super().components | {name: getattr(self, name) for name in _BESIDE_THE_PARTS}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """As diffusers', which casts all networks to `dtype`, by default float32."""
        kept = {name: getattr(pipeline, name) for name in _BESIDE_THE_PARTS if hasattr(pipeline, name)}
        made: Any = super().from_pipe(pipeline, **(kept | kwargs))
        return made

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """This model's defaults: width, height, num_frames, fps, num_inference_steps, guidance_scale, ..."""
        return dict(self.config["sampling_defaults"])

    @property
    def denoiser(self) -> Denoiser:
        """The networks that predict the noise."""
        networks: Any = self.unet, self.image_controlnet, self.motion_controlnet, self.object_gates, self.scene_gates
        return Denoiser(*networks)

    # -- text and pixels

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str], device: torch.device | None = None) -> Tensor:
        """Text embeddings (B, L, D) on a device, by default that of execution; what is not read is warned of, once."""
        texts: Any = self.maybe_convert_prompt(list(prompts), self.tokenizer)
        tokens, left_out = tokenize(self.tokenizer, texts, self.text_encoder.config.max_position_embeddings)
        for prompt, words in zip(prompts, left_out, strict=True):
            if words and prompt not in self._cut_prompts:
                self._cut_prompts.add(prompt)
                warn_of_cut(prompt, words)
        return self.text_encoder(tokens.to(device or self._execution_device)).last_hidden_state

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, chunk_size: int = 16, device: torch.device | str | None = None) -> Tensor:
        """Frames (B, T, 3, H, W) in [0, 1] float32 of latents (B, C, T, h, w), `chunk_size` frames at a time.

        Args:
            latents: (B, C, T, h, w), scaled.
            chunk_size: Frames decoded at a time.
            device: Where the frames come to lie, chunk by chunk; None = where the latents are.

        Raises:
            ValueError: The VAE gives values that are not finite.
        """
        frames = unscale_latents(latents.transpose(1, 2).flatten(0, 1).to(self.vae.dtype), self.vae.config)
        size = (side * self.vae_scale_factor for side in latents.shape[-2:])
        decoded = torch.empty(len(frames), 3, *size, device=device or latents.device)
        for chunk, place in zip(frames.split(chunk_size), decoded.split(chunk_size), strict=True):
            pixels = self.vae.decode(chunk).sample.float()
            refuse_non_finite(self, pixels, "decoding of the latents")
            place.copy_(pixels.div_(2).add_(0.5).clamp_(0, 1))
        return decoded.unflatten(0, (latents.shape[0], latents.shape[2]))


def _dtype_of(name: str, dtype: Any) -> Any:
    """The dtype of a network, where those of several may be given by name, as diffusers takes them."""
    return dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
