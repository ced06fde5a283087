"""Model folders from the parts that people download: what a recipe's parts hold, checked and put together."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DDIMScheduler
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from imageconductor.checkpoints.domain_adapter import DomainAdapter
from imageconductor.checkpoints.few_step import FEW_STEP_FOLDER
from imageconductor.checkpoints.model_card import read_provenance
from imageconductor.checkpoints.model_folder import (
    SCENE_LORA_FOLDER,
    UNET_LORA_FOLDERS,
    adapter_folder,
    adapter_names,
    check_controlnets,
    read_sampling_defaults,
)
from imageconductor.checkpoints.published import PUBLISHED, load_published_network, rename_motion_modules
from imageconductor.checkpoints.recipe import AssemblyConfig, locate_parts
from imageconductor.files import read_text
from imageconductor.models.adapters import (
    DIFFUSERS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    Adapter,
    adapter_parameters,
    load_adapter,
)
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.gating import check_places
from imageconductor.models.motion_unet import SD15_ANIMATEDIFF_V3, MotionUNet
from imageconductor.models.networks import GATES, Networks, load_network, load_scheduler, single_progress_bar
from imageconductor.models.weights import allocate, copy_weights, find_weights, read_checkpoint

_LOG = logging.getLogger(__name__)


@dataclass
class Source:
    """Where a part came from."""

    path: str
    sha256: dict[str, str]  # by file
    keys: int  # tensors that were taken


@dataclass
class Assembly:
    """What a recipe describes.

    Attributes:
        networks: In `dtype` and without gradients, LoRAs attached.
        sampling: Defaults of sampling, fields of `SamplingDefaults`.
        domain_adapter: If there is one.
        provenance: Texts for the folder, by file name.
        carried: Folders of LoRAs of the UNet that are carried along, by their names in the model folder.
    """

    networks: Networks
    sampling: dict[str, Any]
    domain_adapter: DomainAdapter | None
    provenance: dict[str, str]
    carried: dict[str, Path] = field(default_factory=dict)


def assemble(config: AssemblyConfig) -> Assembly:
    """Reads and checks every part of a recipe.

    Raises:
        FileNotFoundError: A part is not there.
        ValueError: A part does not fit; names its file and every key that is missing, left over or mis-shaped.
    """
    paths, dtype = locate_parts(config), getattr(torch, config.dtype)
    networks, sources, assembly = (_trained if config.recipe == "trained" else _downloaded)(config, paths, dtype)
    networks.to(dtype)
    networks.freeze()
    for name in UNET_LORA_FOLDERS:
        if name in paths:
            weights = paths[name] / DIFFUSERS_WEIGHTS_NAME
            sources[name] = _source(paths[name], len(read_checkpoint(weights)), [weights])
            assembly.carried[name] = paths[name]
    record = {"recipe": asdict(config), "sources": {name: asdict(source) for name, source in sources.items()}}
    assembly.provenance["sources.json"] = json.dumps(record, indent=1)
    return assembly


def _downloaded(
    config: AssemblyConfig, paths: Mapping[str, Path], dtype: torch.dtype
) -> tuple[Networks, dict[str, Source], Assembly]:
    """The recipes that begin with Stable Diffusion; small parts first, so that a fault in one costs little."""
    root = paths["stable_diffusion"]
    sizes = unet_sizes(root / "unet") | {"motion_num_attention_heads": config.motion_num_attention_heads}
    tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")
    adapter = None
    if "domain_adapter" in paths:
        adapter = DomainAdapter.read(paths["domain_adapter"], config.domain_adapter_scale)
    with single_progress_bar():
        encoders = {part: load_network(part, root / part, dtype) for part in ("vae", "text_encoder")}
    build = {"published": _published, "animatediff": _animatediff}[config.recipe]
    unet, image_controlnet, motion_controlnet, sources = build(paths, sizes, dtype, adapter)
    if adapter is not None:
        sources["domain_adapter"] = _source(paths["domain_adapter"], len(adapter.state))
    if motion_controlnet is None:
        factor = 2 ** (len(encoders["vae"].config["block_out_channels"]) - 1)
        motion_controlnet = MotionControlNet.from_unet(unet, factor)
    networks = Networks(
        **encoders,
        tokenizer=tokenizer,
        unet=unet,
        image_controlnet=image_controlnet,
        motion_controlnet=motion_controlnet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False
        ),
    )
    for part, network in encoders.items():
        sources[part] = _source(root / part, len(network.state_dict()))
    return networks, sources, Assembly(networks, config.sampling, adapter, {})


def _trained(
    config: AssemblyConfig, paths: Mapping[str, Path], dtype: torch.dtype
) -> tuple[Networks, dict[str, Source], Assembly]:
    """A model folder, and what was trained from it in place of its parts."""
    root = paths["model"]
    loras = {adapter.value: paths.get(f"{adapter.value}_lora") for adapter in Adapter}
    given = {name: folder for name, folder in loras.items() if folder is not None}
    if given or "motion_controlnet" in paths:
        check_controlnets(root, "recipe trained with a motion ControlNet or a LoRA of it")
    networks = Networks.load(root, dtype)
    networks.scheduler = load_scheduler(root)
    provenance = read_provenance(root)
    provenance.pop("results.json", None)  # They were measured on other weights.
    before = json.loads(provenance.get("sources.json", '{"sources": {}}'))["sources"]
    sources = {name: Source(**source) for name, source in before.items()}
    sources["model"] = Source(str(root), {}, 0)

    def record(name: str, keys: int, files: list[Path] | None = None) -> None:
        sources[name] = _source(paths[name], keys, files)
        if (settings := paths[name].parent / "config.yaml").is_file():  # the run that made it
            provenance[f"training/{name}.yaml"] = read_text(settings)

    if folder := paths.get("motion_controlnet"):
        trained = load_network("motion_controlnet", folder, dtype)
        _check_same_sizes(networks.motion_controlnet, trained, folder)
        networks.motion_controlnet = trained
        record("motion_controlnet", len(trained.state_dict()))
    for name in sorted({*adapter_names(root), *given}):
        load_adapter(networks.motion_controlnet, name, given.get(name, adapter_folder(root, name)))
    for name, folder in given.items():
        num_keys = len(adapter_parameters(networks.motion_controlnet, name))
        record(f"{name}_lora", num_keys, [folder / WEIGHTS_NAME])
    for name in GATES:
        if folder := paths.get(name):
            gates = load_network(name, folder, dtype)
            check_places(networks.unet, gates, folder)
            setattr(networks, name, gates)
            record(name, len(gates.state_dict()))
    domain = DomainAdapter.load(root) if DomainAdapter.is_in(root) else None
    carried = {name: root / name for name in UNET_LORA_FOLDERS if (root / name / DIFFUSERS_WEIGHTS_NAME).is_file()}
    outdated = {}
    if given or "motion_controlnet" in paths:
        outdated[FEW_STEP_FOLDER] = "it was distilled from the model before its motion ControlNet changed"
    if "scene_gates" in paths:
        outdated[SCENE_LORA_FOLDER] = "it acts with the scene gates that are replaced"
    for name, reason in outdated.items():
        if carried.pop(name, None) and name not in paths:
            sources.pop(name, None)
            _LOG.info("%s of %s is left out: %s", name, root, reason)
    sampling = {**read_sampling_defaults(root), **config.sampling}
    return networks, sources, Assembly(networks, sampling, domain, provenance, carried)


def _check_same_sizes(ours: MotionControlNet, new: MotionControlNet, folder: Path) -> None:
    shapes, found = ({k: tuple(v.shape) for k, v in network.state_dict().items()} for network in (ours, new))
    if different := sorted(k for k in shapes.keys() | found.keys() if shapes.get(k) != found.get(k)):
        key = different[0]
        raise ValueError(
            f"{folder} is for another model: {len(different)} tensors differ, e.g. {key}, {shapes.get(key)} in the "
            f"model's motion ControlNet and {found.get(key)} in this one"
        )


def unet_sizes(folder: Path) -> dict[str, Any]:
    """Sizes of a Stable Diffusion UNet from its `config.json`, under `load_published_network`'s names.

    Raises:
        ValueError: It is another architecture.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    config = json.loads(read_text(path))
    width = config.get("cross_attention_dim")
    if not isinstance(width, int) or config.get("addition_embed_type") or config.get("use_linear_projection"):
        raise ValueError(
            f"{path} describes another architecture than Stable Diffusion 1.5 (cross_attention_dim {width}, "
            f"addition_embed_type {config.get('addition_embed_type')}, "
            f"use_linear_projection {config.get('use_linear_projection')})"
        )
    return {
        "block_out_channels": tuple(config["block_out_channels"]),
        "layers_per_block": config["layers_per_block"],
        "cross_attention_dim": width,
        "num_attention_heads": config["attention_head_dim"],  # diffusers' name for the number of heads in SD-1.5
        "norm_num_groups": config.get("norm_num_groups", 32),
    }


def _published(
    paths: Mapping[str, Path], sizes: dict[str, Any], dtype: torch.dtype, adapter: DomainAdapter | None
) -> tuple[Any, ...]:
    """The authors' three networks, each converted and its file released before the next is read."""
    networks, sources = [], {}
    for name in PUBLISHED:
        state = read_checkpoint(paths[name])
        if name == "unet" and adapter is not None:
            adapter.merge(state)
        try:
            networks.append(load_published_network(name, state, **sizes, dtype=dtype))
        except ValueError as error:
            raise ValueError(f"{paths[name]}: {error}") from error
        sources[name] = _source(paths[name], len(state))
        del state
    return *networks, sources


def _animatediff(
    paths: Mapping[str, Path], sizes: dict[str, Any], dtype: torch.dtype, adapter: DomainAdapter | None
) -> tuple[Any, ...]:
    """UNet and image ControlNet in `dtype` from Stable Diffusion and AnimateDiff; None for the motion ControlNet."""
    folder = paths["stable_diffusion"] / "unet"
    motion_path, image_path = paths["motion_module"], paths["image_controlnet"]
    motion = {rename_motion_modules(key): value for key, value in _read(motion_path).items()}
    if unexpected := [key for key in motion if ".motion_modules." not in key]:
        raise ValueError(f"{motion_path} holds more than motion modules, e.g. {unexpected[0]}")
    if any(key.startswith("mid_block.") for key in motion):
        raise ValueError(f"{motion_path} has a motion module in the mid block: AnimateDiff v2, expected v3")
    spatial = _read(folder)
    sources = {"unet": _source(folder, len(spatial)), "motion_module": _source(motion_path, len(motion))}
    latent = spatial["conv_in.weight"].shape[1]
    with init_empty_weights(include_buffers=False):
        unet = MotionUNet(**{**SD15_ANIMATEDIFF_V3, **sizes}, in_channels=latent, out_channels=latent)
        image_controlnet = ImageControlNet.from_unet(unet, conditioning_channels=latent)
    if adapter is not None:
        adapter.merge(spatial)
    allocate(unet, dtype)
    copy_weights(unet.state_dict(), {**spatial, **motion}, f"{folder} with {motion_path}")
    del spatial, motion

    image_state = {rename_motion_modules(key): value for key, value in _read(image_path).items()}
    allocate(image_controlnet, dtype)
    copy_weights(image_controlnet.state_dict(), image_state, str(image_path))
    sources["image_controlnet"] = _source(image_path, len(image_state))
    return unet, image_controlnet, None, sources


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file, or of a diffusers folder."""
    if path.is_file():
        return read_checkpoint(path)
    return {key: value for file in find_weights(path)[0] for key, value in read_checkpoint(file).items()}


def _source(path: Path, keys: int, files: list[Path] | None = None) -> Source:
    """The record of a part; `files` are those that were read, by default a file itself or the weights of a network."""
    read = files or ([path] if path.is_file() else find_weights(path)[0])
    return Source(str(path), {file.name: sha256(file) for file in read}, keys)


def sha256(path: Path) -> str:
    """Hash of a file, with a progress bar where it takes a while."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=path.name, delay=1) as bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
