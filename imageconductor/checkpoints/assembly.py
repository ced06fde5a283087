"""Model folders from the parts that people download; the layouts of those parts, and the way back.

| part | layouts |
|---|---|
| Stable Diffusion 1.5 | diffusers folder (tokenizer, text_encoder, vae, unet) |
| published networks | `unet.ckpt`, `image_controlnet.ckpt`, `flow_controlnet.ckpt`, also as safetensors |
| AnimateDiff v3 motion module | original `.ckpt`, or diffusers' MotionAdapter folder |
| RGB SparseCtrl | original `.ckpt`, or diffusers' folder |
| v3 domain adapter | original `.ckpt` (LoRA of the spatial attention) |
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from imageconductor.checkpoints.domain_adapter import DomainAdapter
from imageconductor.checkpoints.few_step import FEW_STEP_FOLDER, find_few_step_lora
from imageconductor.checkpoints.model_card import read_provenance
from imageconductor.checkpoints.model_folder import (
    SCENE_LORA_FOLDER,
    adapter_folder,
    adapter_names,
    find_scene_lora,
    locate,
    locate_model,
    read_sampling_defaults,
)
from imageconductor.checkpoints.published import PUBLISHED, load_published_network, rename_motion_modules
from imageconductor.models.adapters import DIFFUSERS_WEIGHTS_NAME, Adapter, adapter_parameters, load_adapter
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.gating import check_places
from imageconductor.models.motion_unet import SD15_ANIMATEDIFF_V3, MotionUNet
from imageconductor.models.networks import GATES, Networks, load_network
from imageconductor.models.weights import check_weight_file, copy_weights, find_weights, read_checkpoint


@dataclass
class AssemblyConfig:
    """The parts of a model folder: local paths, or "organisation/name[/file]" on the hub."""

    # The authors' three files; a base to train from; or a model folder with what was trained from it.
    recipe: Literal["published", "animatediff", "trained"]
    stable_diffusion: str | None = None  # diffusers folder of SD-1.5 or of a model made from it
    unet: str | None = None  # published: unet.ckpt
    image_controlnet: str | None = None  # published: image_controlnet.ckpt; animatediff: SparseCtrl RGB
    motion_controlnet: str | None = None  # published: flow_controlnet.ckpt; trained: stage 1's folder
    model: str | None = None  # trained: the folder that training began from
    camera_lora: str | None = None  # trained: stage 2's folder
    object_lora: str | None = None  # trained: stage 3's folder
    object_gates: str | None = None  # trained: folder of the gates for boxes, SMCD's stage 1
    scene_gates: str | None = None  # trained: folder of the gates for the first frame, SMCD's stage 2
    scene_lora: str | None = None  # folder of the LoRA that acts with them; null = scene_lora/ beside them, if any
    style_lora: str | None = None  # folder of a style LoRA that the model folder carries along
    few_step_lora: str | None = None  # trained: folder of the LoRA that stage few_step wrote, or another of its kind
    motion_module: str | None = None  # animatediff: v3_sd15_mm.ckpt, or diffusers' folder
    # v3_sd15_adapter.ckpt, kept beside the UNet so that its scale can still be chosen; null = without
    domain_adapter: str | None = None
    domain_adapter_scale: float = 1.0  # with which it is merged; 0 where the UNet holds it already
    motion_num_attention_heads: int = 8
    dtype: Literal["float16", "float32"] = "float16"  # of the folder
    sampling: dict[str, Any] = field(default_factory=dict)  # defaults of sampling that differ from the paper's
    licences: dict[str, str] = field(default_factory=dict)  # of each part, for the model card

    def __post_init__(self) -> None:
        needed = {
            "published": ("stable_diffusion", "unet", "image_controlnet", "motion_controlnet"),
            "animatediff": ("stable_diffusion", "motion_module", "image_controlnet"),
            "trained": ("model",),
        }[self.recipe]
        if missing := [name for name in needed if not getattr(self, name)]:
            raise ValueError(f"recipe {self.recipe} needs {', '.join(missing)}")


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
    named = {"style_lora": config.style_lora, FEW_STEP_FOLDER: config.few_step_lora}
    named[SCENE_LORA_FOLDER] = config.scene_lora or _beside_scene_gates(config)
    carried = {name: locate(folder) for name, folder in named.items() if folder is not None}
    for name, folder in carried.items():
        if not (folder / DIFFUSERS_WEIGHTS_NAME).is_file():
            raise FileNotFoundError(f"{name}={folder}: no folder with {DIFFUSERS_WEIGHTS_NAME}")
    if config.recipe == "trained":
        networks, sources, assembly = _trained(config)
    else:
        networks, sources, assembly = _downloaded(config)
    networks.to(getattr(torch, config.dtype))
    networks.freeze()
    for name, folder in carried.items():
        sources[name] = _source(folder, len(read_checkpoint(folder / DIFFUSERS_WEIGHTS_NAME)))
    assembly.carried |= carried
    record = {"recipe": asdict(config), "sources": {name: asdict(source) for name, source in sources.items()}}
    assembly.provenance["sources.json"] = json.dumps(record, indent=1)
    return assembly


def _beside_scene_gates(config: AssemblyConfig) -> str | None:
    """The LoRA that stage 2 wrote beside its gates."""
    beside = None if config.scene_gates is None else locate(config.scene_gates).parent / SCENE_LORA_FOLDER
    return None if beside is None or not beside.is_dir() else str(beside)


def _downloaded(config: AssemblyConfig) -> tuple[Networks, dict[str, Source], Assembly]:
    """The recipes that begin with Stable Diffusion."""
    root = locate(str(config.stable_diffusion))
    if missing := [name for name in ("tokenizer", "text_encoder", "vae", "unet") if not (root / name).is_dir()]:
        raise FileNotFoundError(f"{root} is no folder of Stable Diffusion 1.5: it lacks {', '.join(missing)}")
    sizes = unet_sizes(root / "unet")
    build = {"published": _published, "animatediff": _animatediff}[config.recipe]
    unet, image_controlnet, motion_controlnet, sources = build(config, root, sizes)
    adapter = None
    if config.domain_adapter is not None:
        path = locate(config.domain_adapter)
        adapter = DomainAdapter.read(path, config.domain_adapter_scale)
        adapter.merge(unet.state_dict())
        sources["domain_adapter"] = _source(path, len(adapter.state))
    vae = load_network("vae", root / "vae")
    if motion_controlnet is None:
        motion_controlnet = MotionControlNet.from_unet(unet, 2 ** (len(vae.config["block_out_channels"]) - 1))
    networks = Networks(
        vae=vae,
        text_encoder=load_network("text_encoder", root / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer"),
        unet=unet,
        image_controlnet=image_controlnet,
        motion_controlnet=motion_controlnet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False
        ),
    )
    for part in ("vae", "text_encoder"):
        sources[part] = _source(root / part, len(getattr(networks, part).state_dict()))
    return networks, sources, Assembly(networks, config.sampling, adapter, {})


def _trained(config: AssemblyConfig) -> tuple[Networks, dict[str, Source], Assembly]:
    """A model folder, and what was trained from it in place of its parts."""
    root = locate_model(str(config.model))
    networks = Networks.load(root)
    provenance = read_provenance(root)
    provenance.pop("results.json", None)  # They were measured on other weights.
    before = json.loads(provenance.get("sources.json", '{"sources": {}}'))["sources"]
    sources = {name: Source(**source) for name, source in before.items()}
    sources["model"] = Source(str(root), {}, 0)

    def record(name: str, folder: Path, keys: int) -> None:
        sources[name] = _source(folder, keys)
        if (settings := folder.parent / "config.yaml").is_file():  # the run that made it
            provenance[f"training/{name}.yaml"] = settings.read_text()

    if config.motion_controlnet is not None:
        folder = locate(config.motion_controlnet)
        trained = load_network("motion_controlnet", folder)
        _check_same_sizes(networks.motion_controlnet, trained, folder)
        networks.motion_controlnet = trained
        record("motion_controlnet", folder, len(trained.state_dict()))
    given = {Adapter.CAMERA.value: config.camera_lora, Adapter.OBJECT.value: config.object_lora}
    given = {name: locate(folder) for name, folder in given.items() if folder is not None}
    for name in sorted({*adapter_names(root), *given}):
        load_adapter(networks.motion_controlnet, name, given.get(name, adapter_folder(root, name)))
    for name, folder in given.items():
        record(f"{name}_lora", folder, len(adapter_parameters(networks.motion_controlnet, name)))
    for name in GATES:
        if (given_gates := getattr(config, name)) is not None:
            folder = locate(given_gates)
            gates = load_network(name, folder)
            check_places(networks.unet, gates, folder)
            setattr(networks, name, gates)
            record(name, folder, len(gates.state_dict()))
    domain = DomainAdapter.load(root) if DomainAdapter.is_in(root) else None
    sampling = {**read_sampling_defaults(root), **config.sampling}
    kept = find_few_step_lora(root)  # which was distilled from the model as it was
    replaced = config.motion_controlnet or given
    carried = {} if kept is None or replaced else {FEW_STEP_FOLDER: kept.parent}
    if config.scene_gates is None and (with_gates := find_scene_lora(root)):
        carried[SCENE_LORA_FOLDER] = with_gates.parent
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
    """Sizes of a Stable Diffusion UNet from its `config.json`, under `load_published`'s names.

    Raises:
        ValueError: It is another architecture.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    config = json.loads(path.read_text())
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


def _published(config: AssemblyConfig, root: Path, sizes: dict[str, Any]) -> tuple[Any, ...]:
    """The authors' three networks, each converted and its file released before the next is read."""
    del root
    sizes |= {"motion_num_attention_heads": config.motion_num_attention_heads, "dtype": getattr(torch, config.dtype)}
    paths = {name: locate(str(getattr(config, name))) for name in PUBLISHED}
    for path in paths.values():
        check_weight_file(path)
    networks, sources = [], {}
    for name, path in paths.items():
        state = read_checkpoint(path)
        try:
            networks.append(load_published_network(name, state, **sizes))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        sources[name] = _source(path, len(state))
        del state
    return *networks, sources


def _animatediff(config: AssemblyConfig, root: Path, sizes: dict[str, Any]) -> tuple[Any, ...]:
    motion_path, image_path = locate(str(config.motion_module)), locate(str(config.image_controlnet))
    motion = {rename_motion_modules(key): value for key, value in _read(motion_path).items()}
    if unexpected := [key for key in motion if ".motion_modules." not in key]:
        raise ValueError(f"{motion_path} holds more than motion modules, e.g. {unexpected[0]}")
    if any(key.startswith("mid_block.") for key in motion):
        raise ValueError(f"{motion_path} has a motion module in the mid block: AnimateDiff v2, expected v3")
    spatial = _read(root / "unet")
    heads = config.motion_num_attention_heads
    sizes = {**sizes, "motion_num_attention_heads": heads}
    latent = spatial["conv_in.weight"].shape[1]
    unet = MotionUNet(**{**SD15_ANIMATEDIFF_V3, **sizes}, in_channels=latent, out_channels=latent)
    sources = {
        "unet": _source(root / "unet", len(spatial)),
        "motion_module": _source(motion_path, len(motion)),
    }
    copy_weights(unet.state_dict(), {**spatial, **motion}, f"{root / 'unet'} with {motion_path}")

    image_state = {rename_motion_modules(key): value for key, value in _read(image_path).items()}
    image_controlnet = ImageControlNet.from_unet(unet, conditioning_channels=latent)
    copy_weights(image_controlnet.state_dict(), image_state, str(image_path))
    sources["image_controlnet"] = _source(image_path, len(image_state))
    return unet, image_controlnet, None, sources


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file, or of a diffusers folder."""
    if path.is_file():
        return read_checkpoint(path)
    return {key: value for file in find_weights(path)[0] for key, value in read_checkpoint(file).items()}


def _source(path: Path, keys: int) -> Source:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
    return Source(str(path), {file.name: sha256(file) for file in files}, keys)


def sha256(path: Path) -> str:
    """Hash of a file, with a progress bar where it takes a while."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=path.name, delay=1) as bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
