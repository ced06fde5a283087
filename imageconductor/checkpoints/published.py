"""Published `.ckpt` files and their key names.

Source: the key names of the released modules, instantiated; `docs/decisions.md` has the map in words.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from imageconductor.models.adapters import Adapter, activate, adapter_pairs, attach_adapter
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.lora_files import pair_up
from imageconductor.models.motion_unet import SD15_ANIMATEDIFF_V3, MotionUNet
from imageconductor.models.weights import allocate, copy_weights, unwrap

PUBLISHED = {
    "unet": "the UNet checkpoint",
    "image_controlnet": "the image ControlNet checkpoint",
    "motion_controlnet": "the motion ControlNet checkpoint",
}
"""The networks of the release, and what messages call their files."""
PUBLISHED_ADAPTERS = {"cmcm_weights": Adapter.CAMERA.value, "omcm_weights": Adapter.OBJECT.value}
"""Names of our LoRAs by those that the release gives them."""
PUBLISHED_MOTION_NORM_GROUPS = 32
"""The released motion modules normalise in 32 groups whatever the spatial layers do."""

_LORA_KEY = re.compile(r"^(?P<layer>.+)\.lora_(?P<side>[AB])\.(?P<adapter>\w+)\.weight$")
_MOTION_NAMES = (
    (".temporal_transformer.", "."),
    (".attention_blocks.0.", ".attn1."),
    (".attention_blocks.1.", ".attn2."),
    (".norms.0.", ".norm1."),
    (".norms.1.", ".norm2."),
    (".ff_norm.", ".norm3."),
)


def from_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Base weights and LoRA weights under our names.

    Sinusoidal position tables are left out: they are computed.

    Raises:
        ValueError: A LoRA has a name that the release does not use.
    """
    base: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.endswith(".pe"):
            continue
        if match := _LORA_KEY.match(key):
            if match["adapter"] not in PUBLISHED_ADAPTERS:
                raise ValueError(
                    f"unknown LoRA {match['adapter']!r} in {key}; expected {', '.join(PUBLISHED_ADAPTERS)}"
                )
            name = f"{rename_motion_modules(match['layer'] + '.').removesuffix('.')}.lora_{match['side']}.weight"
            adapters.setdefault(PUBLISHED_ADAPTERS[match["adapter"]], {})[name] = value
        else:
            base[rename_motion_modules(key.replace(".base_layer.", "."))] = value
    return base, adapters


def to_published(network: nn.Module, adapters: Collection[str] = ()) -> dict[str, Tensor]:
    """A network's weights under the published key names, as the authors' code loads them.

    Args:
        network: A UNet or a ControlNet; LoRAs that it carries must not be merged.
        adapters: LoRAs to write along. The authors' code hangs LoRAs on every layer before it loads the motion
            ControlNet, so with adapters every Linear and Conv2d is named `base_layer`, also one that has no LoRA here.

    Raises:
        ValueError: The release has no place for a part of the network, or no name for an adapter.
    """
    config: Mapping[str, Any] = getattr(network, "config", {})
    if own := [name for name in ("first_frame_warp", "first_frame_skips") if config.get(name)]:
        raise ValueError(f"the published layout has no place for {' and '.join(own)}, which the model's UNet has")
    layers = {
        name.removesuffix(".base_layer")
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ".lora_" not in name
    }
    state: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        name = key.replace(".base_layer.", ".")
        if key.endswith(".pe") or ".lora_" in key:
            continue
        layer, _, kind = name.rpartition(".")
        if adapters and layer in layers:
            name = f"{layer}.base_layer.{kind}"
        state[published_name(name)] = value
    names = {ours: published for published, ours in PUBLISHED_ADAPTERS.items()}
    for adapter in adapters:
        if adapter not in names:
            raise ValueError(f"the published layout has no place for a LoRA {adapter!r}, only for {', '.join(names)}")
        for layer, (down, up) in scaled_pairs(network, adapter).items():
            name = published_name(layer + ".").removesuffix(".")
            state[f"{name}.lora_A.{names[adapter]}.weight"] = down
            state[f"{name}.lora_B.{names[adapter]}.weight"] = up
    return state


def scaled_pairs(network: nn.Module, adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of a LoRA by layer, B times alpha / rank, for which the published files have no place."""
    pairs = adapter_pairs(network, adapter)
    return {layer: (pair.down, pair.up * (pair.alpha / pair.rank)) for layer, pair in pairs.items()}


def published_name(key: str) -> str:
    """Our key under the name that AnimateDiff and the release give it; the inverse of `rename_motion_modules`."""
    if match := re.match(r"(?P<module>.*\.motion_modules\.\d+)(?P<rest>\..*)", key):
        rest = match["rest"]
        for published, ours in _MOTION_NAMES[1:]:
            rest = rest.replace(ours, published)
        key = f"{match['module']}.temporal_transformer{rest}"
    return key


def rename_motion_modules(key: str) -> str:
    """A key of AnimateDiff's motion modules, published or original, under our name; others stay."""
    if ".motion_modules." in key:
        for published, ours in _MOTION_NAMES:
            key = key.replace(published, ours)
    return key


def load_published(
    unet_state: Mapping[str, Any],
    image_controlnet_state: Mapping[str, Any],
    motion_controlnet_state: Mapping[str, Any],
    **sizes: Any,
) -> tuple[MotionUNet, ImageControlNet, MotionControlNet]:
    """The three networks of the published release, in eval mode, with both adapters attached and none active.

    Args:
        unet_state: Contents of `unet.ckpt`.
        image_controlnet_state: Contents of `image_controlnet.ckpt`.
        motion_controlnet_state: Contents of `flow_controlnet.ckpt`; LoRA ranks are read from it.
        sizes: Keyword arguments of `load_published_network`.

    Raises:
        ValueError: Keys or shapes do not match; all of them are named.
    """
    states = (unet_state, image_controlnet_state, motion_controlnet_state)
    unet, image, motion = (load_published_network(n, s, **sizes) for n, s in zip(PUBLISHED, states, strict=True))
    return unet, image, motion


def load_published_network(
    name: str,
    state: Mapping[str, Any],
    *,
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
    layers_per_block: int = 2,
    cross_attention_dim: int = 768,
    num_attention_heads: int = 8,
    motion_num_attention_heads: int = 8,
    norm_num_groups: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A network of the published release, in eval mode and without gradients; no adapter is active.

    Args:
        name: "unet", "image_controlnet" or "motion_controlnet".
        state: Contents of its file.
        block_out_channels: And the rest: SD-1.5's sizes by default.
        layers_per_block: Residual blocks a level.
        cross_attention_dim: Width of the text embedding.
        num_attention_heads: Heads of the spatial attention (the release's `attention_head_dim`).
        motion_num_attention_heads: Heads of the temporal attention.
        norm_num_groups: Groups of the spatial norms.
        dtype: Precision into which the weights are copied, one tensor after the other.

    Raises:
        ValueError: Keys or shapes do not match; all of them are named.
    """
    source = PUBLISHED[name]
    base, adapters = from_published(unwrap(state))
    sizes: dict[str, Any] = {
        "block_out_channels": tuple(block_out_channels),
        "layers_per_block": layers_per_block,
        "cross_attention_dim": cross_attention_dim,
        "motion_num_attention_heads": motion_num_attention_heads,
        "norm_num_groups": norm_num_groups,
        "motion_norm_num_groups": PUBLISHED_MOTION_NORM_GROUPS,
    }
    # Channel counts that the files state themselves are not asked for again.
    latent = _channels(base, "conv_in.weight", source)
    with init_empty_weights(include_buffers=False):
        if name == "unet":
            config = {**SD15_ANIMATEDIFF_V3, **sizes, "num_attention_heads": num_attention_heads}
            network = MotionUNet(**config, in_channels=latent, out_channels=latent)
        else:
            channels = _channels(base, "controlnet_cond_embedding.weight", source)
            config = {**sizes, "attention_head_dim": num_attention_heads, "in_channels": latent}
            if name == "image_controlnet":
                network = ImageControlNet(**config, conditioning_channels=channels - 1)
            else:
                network = MotionControlNet(**config, conditioning_channels=channels, concat_conditioning_mask=False)
    allocate(network, dtype)
    copy_weights(network.state_dict(), base, source)
    for adapter, weights in sorted(adapters.items()):
        of_adapter = f"{source}, {adapter} LoRA"
        attach_adapter(network, adapter, pair_up(weights, of_adapter), source=of_adapter)
    if adapters:
        activate(network)
    return network.eval().requires_grad_(False)


def _channels(state: Mapping[str, Tensor], key: str, source: str) -> int:
    if key not in state:
        raise ValueError(f"{source} has no {key}; found {len(state)} keys, among them {', '.join(list(state)[:3])}")
    return state[key].shape[1]
