"""The seeded weights, LoRAs and inputs of MotionDirector's stored reference outputs (tests/data/parity_md).

Two families: `ANIMATEDIFF`, this project's UNet, and `MODELSCOPE`, diffusers' UNet3DConditionModel.
"""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import UNet3DConditionModel
from parity import fill, normal
from safetensors.torch import load_file

from imageconductor.checkpoints.published import load_published_network, rename_motion_modules
from imageconductor.models.lora_files import LoraPair
from imageconductor.models.motion_module import motion_modules_bypassed
from imageconductor.models.motion_unet import MotionUNet
from imageconductor.models.weights import copy_weights

FOLDER = Path(__file__).parent.parent / "data" / "parity_md"


@dataclass(frozen=True)
class Family:
    """One of the two reference networks.

    Attributes:
        prefix: Of the family's files.
        network: Its name in the key list and in the seeds of its weights.
    """

    prefix: str
    network: str

    @cached_property
    def meta(self) -> dict:
        return json.loads((FOLDER / f"{self.prefix}meta.json").read_text())

    @cached_property
    def config(self) -> dict:
        return self.meta["config"]

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes by published key."""
        return json.loads((FOLDER / f"{self.prefix}keys.json").read_text())["keys"][self.network]

    @cached_property
    def published_names(self) -> dict[str, str]:
        """Published names of layers by ours."""
        layers = {key.removesuffix(".weight") for key in self.shapes}
        return {rename_motion_modules(f"{layer}.").removesuffix("."): layer for layer in layers}

    @property
    def ported_layers(self) -> list[str]:
        """Layers of ours that carry the spatial LoRA of MotionDirector's port: all of the spatial transformers."""
        ours = {layer: name for name, layer in self.published_names.items()}
        return [ours[layer] for layer in self.meta["placement_tiny"]["spatial"]["names"]]

    def expected(self) -> dict[str, torch.Tensor]:
        return load_file(FOLDER / f"{self.prefix}expected.safetensors")

    def weights(self) -> dict[str, torch.Tensor]:
        """State dict of the base under its published key names."""
        salt, shapes = self.config["salt"], self.shapes
        return {k: fill(salt, f"{self.network}/{k}", shape) for k, shape in shapes.items() if not k.endswith(".pe")}

    def lora_state(self, lora: str, layers) -> dict[str, LoraPair]:
        """The seeded LoRA of a set ("temporal", "spatial", "spatial_clip0") on these layers of our network."""
        pairs = {}
        for layer in layers:
            name = self.published_names[layer]
            out, into, *rest = self.shapes[f"{name}.weight"]
            rank = min(self.config["rank"], out, into)
            sides = {"down": (rank, into, *rest), "up": (out, rank, *[1] * len(rest))}
            filled = {side: fill(self.config["salt"], f"{lora}/{name}/{side}", s) for side, s in sides.items()}
            pairs[layer] = LoraPair(filled["down"], filled["up"], alpha=rank)
        return pairs

    def draw(self, name: str, *shape: int) -> torch.Tensor:
        """The seeded input of a name."""
        return torch.from_numpy(normal(self.config["salt"], f"input/{name}", shape)).float()

    def inputs(self) -> dict[str, torch.Tensor]:
        """`latents` and `noise` (1, 4, T, h, w), `text` (1, L, D), `timestep` ()."""
        config = self.config
        latents = (1, self.shapes["conv_in.weight"][1], config["frames"], *(config.get("hw") or config["latent_hw"]))
        return {
            "latents": self.draw("latents", *latents),
            "noise": self.draw("noise", *latents),
            "text": self.draw("text", 1, config["text_len"], config["cross_attention_dim"]),
            "timestep": torch.tensor(config["timestep"]),
        }


ANIMATEDIFF = Family("ad_", "unet")
MODELSCOPE = Family("", "unet3d")


def animatediff_unet(weights: dict[str, torch.Tensor] | None = None) -> MotionUNet:
    """AnimateDiff's UNet with the seeded weights or those given under published names, in eval mode."""
    config = ANIMATEDIFF.config
    return load_published_network(
        "unet",
        ANIMATEDIFF.weights() if weights is None else weights,
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        cross_attention_dim=config["cross_attention_dim"],
        num_attention_heads=config["heads"],
        motion_num_attention_heads=config["motion_heads"],
    )


@contextmanager
def one_temporal_layer_left(unet):
    """Temporal layers bypassed but the mid block's first convolution, which the published code forgets at one frame."""
    with motion_modules_bypassed(unet):
        unet.mid_block.temp_convs[0].is_bypassed = False
        yield


def modelscope_unet(cls=UNet3DConditionModel):
    """diffusers' UNet3DConditionModel with the seeded weights, or our class of it, in eval mode."""
    config = MODELSCOPE.config
    unet = cls(
        down_block_types=tuple(config["down"]),
        up_block_types=tuple(config["up"]),
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        cross_attention_dim=config["cross_attention_dim"],
        attention_head_dim=config["attention_head_dim"],
    )
    copy_weights(unet.state_dict(), MODELSCOPE.weights(), "the seeded UNet3DConditionModel")
    return unet.eval().requires_grad_(False)
