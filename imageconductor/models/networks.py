"""The parts of a model folder, as training and assembly use them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.denoiser import Denoiser
from imageconductor.models.gated_attention import ObjectGates, SceneGates
from imageconductor.models.motion_unet import MotionUNet, TextToVideoUNet
from imageconductor.models.weights import check_weight_file, find_weights

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

NETWORKS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "unet": MotionUNet,
    "image_controlnet": ImageControlNet,
    "motion_controlnet": MotionControlNet,
}
"""Class of each network by the name of its part."""
GATES: dict[str, Any] = {"object_gates": ObjectGates, "scene_gates": SceneGates}
"""Classes of networks that a model may have or not, by the name of the part."""


def load_network(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The network of a part, from its plain weights, or else from those of a variant.

    Raises:
        FileNotFoundError: The folder holds no weights.
        ValueError: A file is damaged.
    """
    network = TextToVideoUNet if name == "unet" and is_text_to_video(folder.parent) else {**NETWORKS, **GATES}[name]
    return network.from_pretrained(folder, dtype=dtype, variant=find_weights(folder)[1])


def is_text_to_video(folder: Path) -> bool:
    """Whether a model folder is of diffusers' `TextToVideoSDPipeline` (ModelScope, ZeroScope), without ControlNets."""
    try:
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # `check_folder` says what is wrong with a folder.
        return False
    return config.get("_class_name") in ("UNet3DConditionModel", TextToVideoUNet.__name__)


@dataclass
class Encoders:
    """The parts of a model that encode clips and captions."""

    vae: Any  # AutoencoderKL, whose outputs diffusers does not type
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    _has_warned = False  # of a text that is cut; without annotation, no part

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """The parts of a model folder, networks in eval mode and frozen, without LoRAs, the scheduler as DDIM.

        Args:
            folder: The folder.
            dtype: Of the networks.

        Raises:
            FileNotFoundError: The folder, or a part of it, is missing.
            ValueError: A part is damaged.
        """
        folder = cls.check_folder(folder)
        with single_progress_bar():
            found = (field.name for field in fields(cls) if (folder / field.name).is_dir())
            loaded = cls(**{name: load_part(name, folder / name, dtype) for name in found})
        loaded.freeze()
        return loaded

    @classmethod
    def check_folder(cls, folder: str | Path) -> Path:
        """The folder of a model, once it is sure that no part is missing or damaged; no weight is read.

        Raises:
            FileNotFoundError: The folder, or a part of it, is missing.
            ValueError: A part is damaged; names the file.
        """
        folder = Path(folder)
        names = [field.name for field in fields(cls) if field.name not in GATES or (folder / field.name).is_dir()]
        if not folder.is_dir():
            raise FileNotFoundError(f"no model folder at {folder}")
        if is_text_to_video(folder):
            names = [name for name in names if not name.endswith("_controlnet")]
        if missing := [name for name in names if not (folder / name).is_dir()]:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
        for name in names:
            if name == "tokenizer":
                _check_tokenizer(folder)
                continue
            config = f"{name}/{'scheduler_config' if name == 'scheduler' else 'config'}.json"
            try:
                json.loads((folder / config).read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise FileNotFoundError(f"{folder} is incomplete: there is no {config}") from None
            except ValueError as error:
                raise ValueError(f"{folder / config} is damaged: {error}") from error
            if name in NETWORKS or name in GATES:
                find_weights(folder / name)
        for path in sorted((*folder.glob("*_lora/*.safetensors"), *folder.glob("domain_adapter/*.safetensors"))):
            check_weight_file(path)
        return folder

    @property
    def parts(self) -> dict[str, Any]:
        """The parts by name; None for one that the model does not have."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks among the parts, by name."""
        return {name: part for name, part in self.parts.items() if name in NETWORKS | GATES and part is not None}

    def freeze(self) -> None:
        """Puts every network into eval mode without gradients."""
        for network in self.modules.values():
            network.eval().requires_grad_(False)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along one side of a latent pixel."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """(B, L) int64 token ids, padded and cut to the text encoder's length; the first text cut is warned of."""
        tokens, left_out = tokenize(self.tokenizer, prompts, self.text_encoder.config.max_position_embeddings)
        for prompt, words in zip(prompts, left_out, strict=True):
            if words and not self._has_warned:
                self._has_warned = True
                warn_of_cut(prompt, words)
        return tokens

    def check_names(self, names: Sequence[str], where: str) -> None:
        """Makes sure that the text encoder reads class names as a whole; see `check_names`."""
        check_names(self.tokenizer, names, self.text_encoder.config.max_position_embeddings, where)

    def encode_names(self, names: Sequence[str]) -> Tensor:
        """(N, D) float32 on the CPU, what the text encoder says of class names; see `encode_names`."""
        return encode_names(self.tokenizer, self.text_encoder, names, self.text_encoder.device)


@dataclass
class Networks(Encoders):
    """All parts of a model; one of text-to-video has another UNet and None in place of the ControlNets."""

    unet: MotionUNet  # or TextToVideoUNet
    scheduler: Any  # DDIMScheduler
    image_controlnet: ImageControlNet = None  # pyright: ignore[reportAssignmentType]
    motion_controlnet: MotionControlNet = None  # pyright: ignore[reportAssignmentType]
    object_gates: ObjectGates | None = None
    scene_gates: SceneGates | None = None

    @property
    def denoiser(self) -> Denoiser:
        """The networks that predict the noise."""
        controlnets = self.image_controlnet, self.motion_controlnet
        return Denoiser(self.unet, *controlnets, self.object_gates, self.scene_gates)

    def leave_out_controlnets(self) -> None:
        """Makes a text-to-video model of this one: ControlNets that nothing uses would take 1.9 GiB of a GPU."""
        self.image_controlnet = self.motion_controlnet = None  # pyright: ignore[reportAttributeAccessIssue]

    def to(self, dtype: torch.dtype) -> None:
        """Casts every network, in place."""
        for network in self.modules.values():
            cast_network(network, dtype)


def load_part(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A network in `dtype`, the tokenizer or DDIM, from its folder; raises as `load_network`."""
    if name in NETWORKS or name in GATES:
        return load_network(name, folder, dtype)
    return {"tokenizer": CLIPTokenizer, "scheduler": DDIMScheduler}[name].from_pretrained(folder)


def load_scheduler(model: Path) -> Any:
    """The scheduler of a model folder, of the class that it was saved as; training takes DDIM at its noise levels.

    Raises:
        ValueError: diffusers has no such scheduler.
    """
    path = model / "scheduler" / "scheduler_config.json"
    name = json.loads(path.read_text(encoding="utf-8")).get("_class_name", DDIMScheduler.__name__)
    scheduler: Any = getattr(diffusers, str(name), None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, SchedulerMixin)):
        raise ValueError(f"{path}: diffusers has no scheduler {name!r}")
    return scheduler.from_pretrained(model / "scheduler")


def _check_tokenizer(folder: Path) -> None:
    tokenizer = folder / "tokenizer"
    if (tokenizer / "tokenizer.json").is_file():
        return
    for name in ("vocab.json", "merges.txt"):
        if not (tokenizer / name).is_file():
            raise FileNotFoundError(f"{folder} is incomplete: there is no tokenizer/{name}")


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[Tensor, list[str]]:
    """(B, L) int64 token ids, padded and cut to `length`, and the end of each prompt that is left out, or ""."""
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    whole = tokenizer(list(prompts), add_special_tokens=False, truncation=True, max_length=1 << 20).input_ids
    kept = length - tokenizer.num_special_tokens_to_add()
    return tokens.input_ids, [tokenizer.decode(ids[kept:]) if len(ids) > kept else "" for ids in whole]


def warn_of_cut(prompt: str, words: str) -> None:
    """Logs what the text encoder does not read of a prompt."""
    logger.warning("the text encoder reads the beginning of %r only; it leaves out %r", prompt, words)


def check_names(tokenizer: Any, names: Sequence[str], length: int, where: str = "boxes") -> None:
    """Makes sure that a text encoder reads class names as a whole.

    Args:
        tokenizer: Of the text encoder.
        names: Of the objects.
        length: Tokens that it reads.
        where: What has the names, for the message.

    Raises:
        ValueError: One has symbols that the tokenizer does not know, or is too long.
    """
    length -= tokenizer.num_special_tokens_to_add()
    for name in names:
        ids = tokenizer(name, add_special_tokens=False, truncation=True, max_length=1 << 20).input_ids
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(f"{where}: the model's tokenizer does not know the class name {name!r}; name it otherwise")
        if len(ids) > length:
            raise ValueError(f"{where}: the class name {name[:60]!r} has {len(ids)} tokens, at most {length} are read")


@torch.no_grad()
def encode_names(tokenizer: Any, text_encoder: Any, names: Sequence[str], device: torch.device) -> Tensor:
    """(N, D) float32 on the CPU, what a text encoder says of class names: its output at the token that ends the text.

    Names that `check_names` refuses would be cut, or read as others. They are encoded one by one, so that a feature
    does not depend on the names beside it.

    Args:
        tokenizer: Of the text encoder.
        text_encoder: CLIPTextModel.
        names: Of the objects.
        device: Where the text encoder runs.
    """
    features = torch.zeros(len(names), text_encoder.config.hidden_size)
    for feature, name in zip(features, names, strict=True):
        tokens, _ = tokenize(tokenizer, [name], text_encoder.config.max_position_embeddings)
        feature.copy_(text_encoder(tokens.to(device)).pooler_output[0])
    return features


def cast_network(network: nn.Module, dtype: torch.dtype) -> None:
    """Casts a network in place; diffusers' own `to` warns of an empty list of modules that it would keep in float32."""
    nn.Module.to(cast(Any, network), dtype)


def cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Casts in place what does not learn of a network: under autocast the base of a LoRA takes half the memory so."""
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def single_progress_bar() -> Iterator[None]:
    """Inside the block transformers shows no progress bars within those of diffusers and of our commands."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()
