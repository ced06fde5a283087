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
        ValueError: The file is truncated, no checkpoint, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return unwrap(load_file(path))
        return unwrap(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # Both readers raise many types for one fact: this is no readable checkpoint.
        raise ValueError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error


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
