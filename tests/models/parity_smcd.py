"""The seeded weights and inputs of SMCD's stored reference outputs (tests/data/parity_smcd), and its UNet's key names.

The published names of the UNet are ModelScope's own; `backbone_names` says what diffusers calls them.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from parity import TOLERANCE, normal, relative_error
from safetensors.torch import load_file

from imageconductor.checkpoints.smcd import split_cell
from imageconductor.models.gated_attention import ObjectGate, SceneGate
from imageconductor.models.motion_module import adopt_temporal_layers_
from imageconductor.models.motion_unet import TextToVideoUNet
from imageconductor.models.weights import copy_weights

FOLDER = Path(__file__).parent.parent / "data" / "parity_smcd"
META = json.loads((FOLDER / "meta.json").read_text())
KEYS = json.loads((FOLDER / "keys.json").read_text())["keys"]
CONFIG = META["config"]
FULL_SIZE = json.loads((FOLDER / "full_size_keys.json").read_text())


@cache
def expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "expected.safetensors")


def fill(name: str, shape) -> torch.Tensor:
    """The seeded values of one weight."""
    values = normal(CONFIG["salt"], name, shape)
    if len(shape) >= 2:
        values = values / (torch.Size(shape[1:]).numel() ** 0.5)
    elif len(shape) == 1:
        values = 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
    else:
        values = 0.6 + 0.2 * values
    return torch.as_tensor(values).float()


def weights(module: str, tag: str | None = None) -> dict[str, torch.Tensor]:
    """State dict of a published module under its published key names; the UNet's are seeded by another tag."""
    return {key: fill(f"{tag or module}/{key}", shape) for key, shape in KEYS[module].items()}


def draw(name: str, *shape: int) -> torch.Tensor:
    """The seeded input of a name."""
    return torch.as_tensor(normal(CONFIG["salt"], f"input/{name}", shape)).float()


def unet_context() -> int:
    """Width of the UNet's text."""
    return next(
        shape[1]
        for key, shape in KEYS["unet_base"].items()
        if key.endswith(".1.transformer_blocks.0.attn2.to_k.weight") and not key.startswith("input_blocks.0.")
    )


def inputs() -> dict[str, torch.Tensor]:
    """Everything but boxes and masks, which are stored."""
    c, frames, unet_hw = CONFIG, CONFIG["frames"], CONFIG["unet_hw"]
    width = KEYS["block"]["gate_attn.linear.weight"][1]
    channels = KEYS["visual_encoder"]["conv_in.weight"][1]
    return {
        "hidden": draw("hidden", frames, c["hw"], c["query_dim"]),
        "box_tokens": draw("box_tokens", frames, c["boxes"], c["token_dim"]),
        "image_tokens": draw("image_tokens", frames, c["visual_tokens"], c["visual_dim"]),
        "entity_embeddings": draw("entity_embeddings", frames, c["boxes"], c["text_dim"]),
        "box_tokens_1024": draw("box_tokens_1024", frames, c["boxes"], width),
        "image_tokens_1024": draw("image_tokens_1024", frames, 16, width),
        "text": draw("text", frames, c["text_len"], KEYS["block"]["attn2.to_k.weight"][1]),
        "first_frame_latent": draw("first_frame_latent", 1, channels, *c["latent_hw"]),
        "unet/noisy": draw("unet/noisy", 1, channels, frames, *unet_hw),
        "unet/image_latent": draw("unet/image_latent", 1, channels, *unet_hw),
        "unet/text": draw("unet/text", 1, c["text_len"], unet_context()),
        "unet/null_text": draw("unet/null_text", 1, c["text_len"], unet_context()),
    }


def load_cell(state: dict[str, torch.Tensor], heads: int, head_dim: int) -> tuple[ObjectGate, SceneGate | None]:
    """A published gated cell as our gates; the scalars beta of the parallel variant are not among them."""
    objects, scene = split_cell({key: value for key, value in state.items() if not key.startswith("beta_")})
    width, token_dim = objects["linear.weight"].shape
    object_gate, scene_gate = ObjectGate(width, token_dim, heads, head_dim), None
    copy_weights(object_gate.state_dict(), objects, "object gate")
    if scene:
        scene_gate = SceneGate(width, scene["linear.weight"].shape[1], heads, head_dim)
        copy_weights(scene_gate.state_dict(), scene, "scene gate")
    return object_gate, scene_gate


def has_attention(sizes: dict, level: int) -> bool:
    return any(abs(scale - 0.5**level) < 1e-6 for scale in sizes["attn_scales"])


def backbone_prefixes(sizes: dict) -> dict[str, str]:
    """diffusers' names of ModelScope's modules, both with a dot at the end."""
    levels, depth = len(sizes["dim_mult"]), sizes["num_res_blocks"]
    names = {"input_blocks.0.0.": "conv_in.", "input_blocks.0.1.": "transformer_in."}
    names |= {"time_embed.0.": "time_embedding.linear_1.", "time_embed.2.": "time_embedding.linear_2."}
    names |= {"out.0.": "conv_norm_out.", "out.2.": "conv_out."}

    def add(block: str, place: str, number: int, attends: bool) -> int:
        parts = ["resnets", "attentions", "temp_attentions"] if attends else ["resnets"]
        names[f"{block}.0.temopral_conv."] = f"{place}.temp_convs.{number}."
        names.update({f"{block}.{k}.": f"{place}.{part}.{number}." for k, part in enumerate(parts)})
        return len(parts)

    k = 1
    for level in range(levels):
        for number in range(depth):
            add(f"input_blocks.{k}", f"down_blocks.{level}", number, has_attention(sizes, level))
            k += 1
        if level < levels - 1:
            names[f"input_blocks.{k}.op."] = f"down_blocks.{level}.downsamplers.0.conv."
            k += 1
    add("middle_block", "mid_block", 0, True)
    names |= {"middle_block.3.temopral_conv.": "mid_block.temp_convs.1.", "middle_block.3.": "mid_block.resnets.1."}
    k = 0
    for level in reversed(range(levels)):
        for number in range(depth + 1):
            up = levels - 1 - level
            parts = add(f"output_blocks.{k}", f"up_blocks.{up}", number, has_attention(sizes, level))
            if number == depth and level > 0:
                names[f"output_blocks.{k}.{parts}.conv."] = f"up_blocks.{up}.upsamplers.0.conv."
            k += 1
    return names


RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2"}
RESNET |= {"out_layers.3": "conv2", "skip_connection": "conv_shortcut"}


def backbone_state(state: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """The UNet's weights, gates apart, under diffusers' names."""
    prefixes = sorted(backbone_prefixes(sizes).items(), key=lambda item: -len(item[0]))
    renamed = {}
    for key, value in state.items():
        if ".gate_attn." in key:
            continue
        published, ours = next((p, o) for p, o in prefixes if key.startswith(p))
        rest = key.removeprefix(published)
        if ".resnets." in ours:
            layer, _, kind = rest.rpartition(".")
            rest = f"{RESNET[layer]}.{kind}"
        is_temporal = "temp_attentions." in ours or ours == "transformer_in."
        renamed[ours + rest] = value.squeeze(-1) if is_temporal and re.match(r"proj_(in|out)\.weight", rest) else value
    return renamed


def first_conv() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the two halves of the first convolution: noisy latents, first frame."""
    key = "input_blocks.0.0.weight"
    shape = KEYS["unet_base"][key]
    return fill(f"unet/{key}", shape), 0.3 * fill(f"unet/{key}_image_half", shape)


def backbone() -> TextToVideoUNet:
    """The tiny network without gates, in eval mode."""
    sizes = CONFIG["unet"]
    levels = len(sizes["dim_mult"])
    kinds = ["CrossAttn" if has_attention(sizes, level) else "" for level in range(levels)]
    state = weights("unet_base", "unet")
    width = state["input_blocks.0.0.weight"].shape[0]
    unet = TextToVideoUNet(
        down_block_types=tuple(f"{kind}DownBlock3D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock3D" for kind in reversed(kinds)),
        block_out_channels=tuple(width * mult for mult in sizes["dim_mult"]),
        layers_per_block=sizes["num_res_blocks"],
        cross_attention_dim=unet_context(),
        attention_head_dim=sizes["head_dim"],
    )
    # diffusers builds this one with 8 heads, whatever the sizes.
    heads, norm = sizes["num_heads"], unet.config["norm_num_groups"]
    unet.transformer_in = TransformerTemporalModel(heads, sizes["head_dim"], width, num_layers=1, norm_num_groups=norm)
    adopt_temporal_layers_(unet)
    copy_weights(unet.state_dict(), backbone_state(state, sizes), "the seeded UNet")
    return unet.eval().requires_grad_(False)


def assert_close(value, reference, key, tolerance=TOLERANCE):
    assert relative_error(value, reference[key]) <= tolerance, key
    if key in META["max_abs"]:
        assert value.abs().max().item() == pytest.approx(META["max_abs"][key], rel=1e-3, abs=1e-6), key


def ddim_scheduler():
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,  # the last step goes to the noise level of t = 0
        steps_offset=1,
    )
