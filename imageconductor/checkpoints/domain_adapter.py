"""AnimateDiff v3's domain adapter: a LoRA of the UNet's spatial attention that took up the look of the training videos.

A model folder holds it merged into the UNet, and beside it in `domain_adapter/`, so that sampling can choose another
scale: the difference is attached as one more LoRA.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from imageconductor.files import atomic_path
from imageconductor.models.weights import read_checkpoint

_KEY = re.compile(r"^(?:unet\.)?(?P<layer>.+?)(?:\.processor)?[._](?:lora|lora_layer)\.(?P<side>down|up)\.weight$")
_FILE = Path("domain_adapter") / "pytorch_lora_weights.safetensors"


@dataclass
class DomainAdapter:
    """The adapter's pairs.

    Attributes:
        state: `unet.LAYER.lora_A.weight` (r, in) and `unet.LAYER.lora_B.weight` (out, r), diffusers' names.
        merged_scale: With which the UNet beside it holds it already.
        source: Where it came from, for messages.
    """

    state: dict[str, Tensor]
    merged_scale: float
    source: str

    @classmethod
    def read(cls, path: Path, merged_scale: float) -> DomainAdapter:
        """The adapter of an original file, `v3_sd15_adapter.ckpt`.

        Raises:
            ValueError: A key is no LoRA's, or has no counterpart.
        """
        state = {}
        for key, value in read_checkpoint(path).items():
            match = _KEY.match(key)
            if not match:
                raise ValueError(f"{path}: {key} is no LoRA weight (expected LAYER.processor.to_q_lora.down.weight)")
            layer = match["layer"].replace(".processor.", ".")
            layer = layer + ".0" if layer.endswith(".to_out") else layer
            state[f"unet.{layer}.lora_{'A' if match['side'] == 'down' else 'B'}.weight"] = value
        for key in state:
            if (other := _counterpart(key)) not in state:
                raise ValueError(f"{path}: {key} has no counterpart {other}")
        return cls(state, merged_scale, str(path))

    def merge(self, state: dict[str, Tensor]) -> None:
        """Puts the sum with `merged_scale * B @ A` of every pair, in float32, in the place of a UNet's weights.

        Raises:
            ValueError: A pair fits no weight; nothing has been changed then.
        """
        updates = {}
        for key, down in self.state.items():
            if ".lora_A." not in key:
                continue
            name = key.removeprefix("unet.").replace(".lora_A.", ".")
            update = self.state[_counterpart(key)].float() @ down.float()
            if name not in state:
                raise ValueError(f"{self.source}: the UNet has no {name}")
            if update.shape != state[name].shape:
                raise ValueError(f"{self.source}: {name} is {tuple(state[name].shape)}, its LoRA {tuple(update.shape)}")
            updates[name] = update
        for name, update in updates.items():
            state[name] = state[name].float() + self.merged_scale * update

    def save(self, model: Path) -> None:
        """Writes `domain_adapter/` into a model folder."""
        tensors = {key: value.contiguous() for key, value in self.state.items()}
        with atomic_path(model / _FILE) as path:
            save_file(tensors, path, {"format": "pt", "merged_scale": str(self.merged_scale)})

    @staticmethod
    def is_in(model: Path) -> bool:
        """Whether a model folder has one; loads no weight."""
        return (model / _FILE).is_file()

    @classmethod
    def load(cls, model: Path) -> DomainAdapter:
        """The adapter of a model folder that has one.

        Raises:
            ValueError: Its file is damaged.
        """
        state = read_checkpoint(model / _FILE)
        with safe_open(model / _FILE, "pt") as file:
            return cls(state, float(file.metadata()["merged_scale"]), str(model / _FILE))


def _counterpart(key: str) -> str:
    return key.replace(".lora_A.", ".lora_B.") if ".lora_A." in key else key.replace(".lora_B.", ".lora_A.")
