"""The seeded weights and inputs of the stored reference outputs (tests/data/parity)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

FOLDER = Path(__file__).parent.parent / "data" / "parity"
REFERENCE = json.loads((FOLDER / "keys.json").read_text())
CONFIG, SALT = REFERENCE["config"], REFERENCE["salt"]
TOLERANCE = 1e-4


def expected() -> dict[str, torch.Tensor]:
    return {**load_file(FOLDER / "expected.safetensors"), **load_file(FOLDER / "derived_eq5.safetensors")}


def normal(salt: str, name: str, shape) -> np.ndarray:
    """Standard normal float64 numbers that depend on salt and name alone."""
    seed = zlib.crc32((salt + name).encode()) & 0xFFFFFFFF
    return np.random.RandomState(seed).standard_normal(int(np.prod(shape))).reshape(shape)


def fill(salt: str, name: str, shape) -> torch.Tensor:
    """The seeded values of one weight; those of a LoRA's "up" are a quarter as large."""
    values = normal(salt, name, shape)
    if len(shape) >= 2:
        values = values / np.sqrt(np.prod(shape[1:])) * (0.25 if ".lora_B." in name or name.endswith("/up") else 1)
    else:
        values = 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
    return torch.from_numpy(values.astype(np.float32))


def weights(module: str) -> dict[str, torch.Tensor]:
    """State dict of a published module under its published key names."""
    shapes = REFERENCE["keys"][module]
    return {key: fill(SALT, f"{module}/{key}", s) for key, s in shapes.items() if not key.endswith(".pe")}


def model_config() -> dict:
    return {
        "block_out_channels": tuple(CONFIG["block_out_channels"]),
        "layers_per_block": CONFIG["layers_per_block"],
        "cross_attention_dim": CONFIG["cross_attention_dim"],
        "num_attention_heads": CONFIG["heads"],
        "motion_num_attention_heads": CONFIG["motion_heads"],
    }


def published_scheduler() -> DDIMScheduler:
    """The scheduler of the published sampling loops, which a folder of the published networks has too."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False)


def inputs() -> dict[str, torch.Tensor]:
    (h, w), frames, batch = CONFIG["latent_hw"], CONFIG["frames"], CONFIG["unet_batch"]

    def draw(name, *shape):
        return torch.from_numpy(normal(SALT, f"input/{name}", shape).astype(np.float32))

    condition = torch.zeros(1, 4, frames, h, w)
    condition[:, :, 0] = draw("image_latent", 1, 4, h, w)
    mask = torch.zeros(1, 1, frames, h, w)
    mask[:, :, 0] = 1
    flow = draw("flow", 1, 2, frames, 8 * h, 8 * w)
    flow[:, :, 0] = 0
    return {
        "sample": draw("sample", batch, 4, frames, h, w),
        "text": draw("text", batch, CONFIG["text_len"], CONFIG["cross_attention_dim"]),
        "condition": condition,
        "mask": mask,
        "flow": flow,
        "loop_latents": draw("loop_latents", 1, 4, frames, h, w),
        "timestep": torch.tensor(CONFIG["timestep"]),
    }


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    assert value.shape == reference.shape
    return ((value - reference).abs().max() / reference.abs().max()).item()
