"""Reading weights without running code, and copying them without losing any."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` or a pickled `.ckpt`/`.pt`/`.bin` file, which is read without running code.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is truncated, no checkpoint, a pickle that holds more than tensors, or has weights that are
            nan or infinite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            state = unwrap(load_file(path))
        else:
            state = unwrap(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # Both readers raise many types for one fact: this is no readable checkpoint.
        raise ValueError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if (key := find_non_finite(state)) is not None:
        raise ValueError(f"{path} is damaged: {key} holds nan or infinite values")
    return state


def find_non_finite(state: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds nan or infinite values, if there is one."""
    for key, value in state.items():
        # Formats of one byte have no infinity; offloaded weights lie elsewhere.
        if value.is_floating_point() and value.itemsize > 1 and not value.is_meta and not value.isfinite().all():
            return key
    return None


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a checkpoint that may be nested in `state_dict` or `controlnet` and prefixed by `module.`."""
    state: Mapping[str, Any] = checkpoint
    for key in ("state_dict", "controlnet"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def copy_weights(target: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Copies `state` into `target`, which must have the same names and shapes.

    Raises:
        ValueError: Names every missing, unexpected and mis-shaped key at once; nothing has been copied then.
    """
    wanted = {key: value for key, value in target.items() if not key.endswith(".pe")}
    given = {key: value for key, value in state.items() if not key.endswith(".pe")}
    problems = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "mis-shaped": [
            f"{key} (expected {tuple(wanted[key].shape)}, found {tuple(given[key].shape)})"
            for key in sorted(wanted.keys() & given.keys())
            if wanted[key].shape != given[key].shape
        ],
    }
    if any(problems.values()):
        lines = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
        raise ValueError(f"{source} does not fit the model; " + "; ".join(lines))
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(given[key])
