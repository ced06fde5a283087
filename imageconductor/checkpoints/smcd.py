"""Released SMCD and GLIGEN checkpoints as object gates and scene gates.

| file of SMCD's accelerate folder | here |
|---|---|
| `pytorch_model.bin`, `...gate_attn.*` | gates; its `cross_*` and `v_linear` are those of the scene |
| `pytorch_model.bin`, `input_blocks.0.0.weight` | its second half of the inputs is the input branch |
| `pytorch_model.bin`, the rest | left out: ModelScope's backbone, retrained in part |
| `pytorch_model_1.bin` | position network |
| `pytorch_model_2.bin` | first-frame encoder |

GLIGEN's files hold `...fuser.*` and `position_net.*` beside Stable Diffusion's UNet, under its original names, with the
network in `model`, or diffusers'. The order in which blocks are computed says which gate belongs where.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor

from imageconductor.models.gated_attention import MAX_OBJECTS, ObjectGates, SceneGates
from imageconductor.models.gating import gate_places
from imageconductor.models.weights import allocate, copy_weights, read_checkpoint

SMCD_HEAD_DIM = 64
"""Width of the heads of SMCD's gates at every place."""
GLIGEN_HEADS = 8
"""Heads of GLIGEN's gates, as of Stable Diffusion's attention."""
MAX_OF_IMAGES = 30
"""Objects to which gates that were trained on images, GLIGEN's and those of SMCD's first stage, pad."""

_LOG = logging.getLogger(__name__)
_GATE = re.compile(r"^(?P<block>.+\.transformer_blocks\.\d+)\.(?P<kind>gate_attn|fuser)\.(?P<weight>.+)$")
_SCENE = re.compile(r"^(?:cross_(?=attn\.|ff\.|norm\d\.|alpha_)|v_(?=linear\.))(?P<weight>.+)$")
_FIRST_CONVOLUTION = "input_blocks.0.0.weight"


def load_smcd(
    path: str | Path, unet: Any, *, head_dim: int | None = None, max_objects: int | None = None
) -> tuple[ObjectGates, SceneGates | None]:
    """Gates of a released checkpoint for a UNet, in eval mode and without gradients.

    Args:
        path: An accelerate folder of SMCD, or a file of GLIGEN.
        unet: That the gates are for; its text must be as wide as the checkpoint's.
        head_dim: Width of the gates' heads, which files do not tell; None = SMCD's 64, or that of GLIGEN's 8 heads.
        max_objects: To which the checkpoint padded its clips, which changes attention; None = 30, as GLIGEN and SMCD's
            first stage, or 8 of a checkpoint with scene gates, SMCD's second stage.

    Returns:
        Object gates, and scene gates if the checkpoint has them.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is no such checkpoint, or does not fit the UNet.
    """
    path = Path(path)
    if not path.is_dir():
        return build_gates(read_checkpoint(path), None, None, unet, str(path), head_dim, max_objects)
    unet_state = read_checkpoint(path / "pytorch_model.bin")
    others = [path / f"pytorch_model_{number}.bin" for number in (1, 2)]
    position, image = (read_checkpoint(other) if other.is_file() else None for other in others)
    return build_gates(unet_state, position, image, unet, str(path), head_dim, max_objects)


def build_gates(
    unet_state: Mapping[str, Tensor],
    position_state: Mapping[str, Tensor] | None,
    image_state: Mapping[str, Tensor] | None,
    unet: Any,
    source: str,
    head_dim: int | None = None,
    max_objects: int | None = None,
) -> tuple[ObjectGates, SceneGates | None]:
    """`load_smcd` from the tensors of the files: the UNet's, the position network's, the first-frame encoder's."""
    cells, others = split_gates(unet_state, source)
    is_smcd = _GATE.match(next(key for key in unet_state if _GATE.match(key)))["kind"] == "gate_attn"  # type: ignore[index]
    objects, scene = place_gates(cells, unet, source)
    position_key = "position_net."
    inside = {k.removeprefix(position_key): v for k, v in others.items() if k.startswith(position_key)}
    position = dict(position_state or inside)
    if "null_positive_feature" not in position:
        raise ValueError(f"{source} holds no position network (pytorch_model_1.bin, or position_net.* among its keys)")
    text_dim, token_dim = len(position["null_positive_feature"]), position["linears.4.bias"].shape[0]
    if text_dim != unet.config["cross_attention_dim"]:
        raise ValueError(
            f"{source} describes objects by text features of {text_dim} numbers and this model by "
            f"{unet.config['cross_attention_dim']}; the published SMCD model as a whole, on ModelScope's text-to-video "
            "network and its text encoder, is not supported"
        )
    places = {
        name: (width := len(state["norm1.weight"]), *_heads(width, head_dim, is_smcd))
        for name, state in objects.items()
    }
    with init_empty_weights(include_buffers=False):
        object_gates = ObjectGates(
            places, text_dim, token_dim, max_objects or (MAX_OBJECTS if scene else MAX_OF_IMAGES)
        )
    named = {f"gates.{name}.{key}": value for name, state in objects.items() for key, value in state.items()}
    _fill(object_gates, {**{f"position_net.{k}": v for k, v in position.items()}, **named}, f"{source}, object gates")
    scene_gates = _build_scene(scene, others, image_state, places, source) if scene else None
    num_left = len(others) - len(inside)
    _LOG.warning(
        "%s: %d tensors of the network around the gates are left out; the base keeps its own", source, num_left
    )
    return object_gates, scene_gates


def split_gates(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Weights of each published block's gate, blocks in the order in which they are computed, and all other weights.

    Raises:
        ValueError: There is no gate, or one of a variant that our gates cannot stand for.
    """
    cells: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _GATE.match(key)
        if match is None:
            others[key] = value
            continue
        cells.setdefault(match["block"], {})[match["weight"]] = value
    if not cells:
        raise ValueError(f"{source} holds no gates: none of its {len(state)} keys is ...gate_attn.* or ...fuser.*")
    variant = _name_variant({key for cell in cells.values() for key in cell})
    if variant is not None:
        raise ValueError(f"{source} is of SMCD's variant {variant!r}, which is not supported")
    return dict(sorted(cells.items(), key=lambda item: _computed_at(item[0]))), others


def place_gates(
    cells: Mapping[str, Mapping[str, Tensor]], unet: Any, source: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Weights of object gates and of scene gates by our place, under our names; the second are empty without them.

    Raises:
        ValueError: The UNet has more or fewer places, or one of another width.
    """
    places = gate_places(unet)
    if len(cells) != len(places):
        raise ValueError(f"{source} has gates at {len(cells)} places, and the model has {len(places)} for them")
    objects: dict[str, dict[str, Tensor]] = {}
    scene: dict[str, dict[str, Tensor]] = {}
    for (name, place), (block, state) in zip(places.items(), cells.items(), strict=True):
        width = len(state["norm1.weight"])
        if width != place.width:
            raise ValueError(f"{source}: the gate of {block} is {width} wide, its place {name} {place.width}")
        objects[name], of_scene = split_cell(state)
        if of_scene:
            scene[name] = of_scene
    return objects, scene


def split_cell(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the object gate and of the scene gate of one published gate, under our names."""
    objects: dict[str, Tensor] = {}
    scene: dict[str, Tensor] = {}
    for key, value in state.items():
        if match := _SCENE.match(key):
            scene[match["weight"]] = value
        else:
            objects[key] = value
    return objects, scene


def _build_scene(
    scene: Mapping[str, Mapping[str, Tensor]],
    others: Mapping[str, Tensor],
    image_state: Mapping[str, Tensor] | None,
    places: Mapping[str, Any],
    source: str,
) -> SceneGates:
    """Scene gates with the first-frame encoder and the input branch."""
    if image_state is None or "conv_in.weight" not in image_state or "body.0.in_conv.weight" not in image_state:
        raise ValueError(f"{source} has gates for the first frame and no first-frame encoder (pytorch_model_2.bin)")
    channels, latent_channels = image_state["conv_in.weight"].shape[:2]
    widths, blocks = [int(channels)], 0
    while f"body.{blocks}.in_conv.weight" in image_state:
        if f"body.{blocks}.down_opt.op.weight" in image_state:
            widths.append(len(image_state[f"body.{blocks}.in_conv.bias"]))
        blocks += 1
    both = others.get(_FIRST_CONVOLUTION)
    state = {f"image_encoder.{key}": value for key, value in image_state.items()}
    state |= {f"gates.{name}.{key}": value for name, of_place in scene.items() for key, value in of_place.items()}
    if both is None or both.shape[1] != 2 * latent_channels:
        raise ValueError(f"{source}: {_FIRST_CONVOLUTION} does not read the first frame beside the noisy latents")
    state["input_branch.weight"] = both[:, latent_channels:]
    with init_empty_weights(include_buffers=False):
        network = SceneGates(places, int(latent_channels), widths, blocks // len(widths), both.shape[0])
    _fill(network, state, f"{source}, scene gates")
    return network


def _fill(network: Any, state: Mapping[str, Tensor], source: str) -> None:
    allocate(network, next(iter(state.values())).dtype)
    copy_weights(network.state_dict(), state, source)
    network.eval().requires_grad_(False)


def _heads(width: int, head_dim: int | None, is_smcd: bool) -> tuple[int, int]:
    """Heads and their width."""
    head_dim = head_dim or (SMCD_HEAD_DIM if is_smcd else width // GLIGEN_HEADS)
    return width // head_dim, head_dim


def _name_variant(keys: Collection[str]) -> str | None:
    """SMCD's name for the gates of a checkpoint, if ours cannot stand for them."""
    if any(key.startswith("visual_") for key in keys):
        return "double"
    if "beta_g" in keys:
        return "parallel"  # adds its input once more than ours
    return "merge" if "v_linear.weight" in keys and "cross_attn.to_q.weight" not in keys else None


def _computed_at(block: str) -> tuple[int, list[int]]:
    """Where a block comes among those of a UNet, by its published or its diffusers' name."""
    part = next((k for k, names in enumerate(_PARTS) if re.search(names, block)), len(_PARTS))
    return part, [int(number) for number in re.findall(r"\d+", block)]


_PARTS = ("input_blocks|down_blocks", "middle_block|mid_block", "output_blocks|up_blocks")
