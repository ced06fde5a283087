"""Reading weights without running code, and copying them without losing any."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?"
    r"(?:-\d+-of-(?P<shards>\d+))?\.(?P<format>safetensors|bin)"
)


def find_weights(part: Path) -> tuple[list[Path], str | None]:
    """Weight files of a folder that diffusers or transformers wrote, and their variant; no weight is read.

    Plain files come before those of a variant such as "fp16", and safetensors before pickles.

    Raises:
        FileNotFoundError: There are none, or a shard is missing.
        ValueError: A file is damaged.
    """
    found: dict[tuple[str, bool], list[tuple[Path, int]]] = {}
    for path in sorted(part.iterdir()) if part.is_dir() else ():
        if match := _WEIGHTS.fullmatch(path.name):
            key = (match["variant"] or "", match["format"] == "bin")
            found.setdefault(key, []).append((path, int(match["shards"] or 1)))
    if not found:
        raise FileNotFoundError(f"{part} holds no weights, such as diffusion_pytorch_model.safetensors")
    variant, _ = key = min(found)
    paths = [path for path, _ in found[key]]
    if len(paths) < found[key][0][1]:
        raise FileNotFoundError(f"{part} holds {len(paths)} of the {found[key][0][1]} shards of its weights")
    for path in paths:
        check_weight_file(path)
    return paths, variant or None


def has_weights(part: Path) -> bool:
    """Whether `find_weights` finds any; a damaged file is a ValueError there, and here."""
    try:
        return bool(find_weights(part))
    except FileNotFoundError:
        return False


def check_weight_file(path: Path) -> None:
    """Makes sure that a file of weights is complete, by its header and length; no weight is read.

    Raises:
        ValueError: It is truncated, damaged, or the pointer that Git LFS leaves in the place of a file.
    """
    with path.open("rb") as file:
        head = file.read(32)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer and not the file itself, which `git lfs pull` fetches")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif head.startswith(b"PK"):
            zipfile.ZipFile(path).close()
    except Exception as error:  # safetensors' own type, zipfile's, and the system's.
        raise ValueError(f"{path} is truncated or damaged: {str(error).splitlines()[0]}") from error


def read_checkpoint(path: str | Path, beginnings: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` or a pickled `.ckpt`/`.pt`/`.bin` file, which is read without running code.

    The tensors are mapped into memory: pages of the file, which the system drops again where memory is short.

    Args:
        path: The file.
        beginnings: Of the names that are read; the noise schedule and the averages of a training checkpoint, say, may
            hold what is not finite.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is truncated, no checkpoint, a pickle that holds more than tensors, has no names for them,
            or has weights that are nan or infinite.
    """
    state = {key: value for key, value in _read_state(Path(path)).items() if key.startswith(beginnings)}
    _refuse_non_finite(path, state)
    return state


def read_names(path: str | Path) -> list[str]:
    """Names of the tensors in a file, whose values are not read; errors as `read_checkpoint`."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return list(_read_state(path))
    check_weight_file(path)
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a file by name; errors as `read_checkpoint`, but for values that are not finite."""
    content = _read(path)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is a {type(content).__name__} without names for its weights; "
            "lists of MotionDirector's LoRAs are read by imageconductor.checkpoints.motion_director"
        )
    return unwrap(content)


def read_tensor_list(path: str | Path) -> list[Tensor]:
    """Tensors of a pickled list, which is read without running code.

    Raises:
        FileNotFoundError: No such file.
        ValueError: As `read_checkpoint`, or it is no list of tensors.
    """
    content = _read(Path(path))
    if not isinstance(content, list) or not all(isinstance(item, Tensor) for item in content):
        raise ValueError(f"{path} is no list of tensors: it holds a {type(content).__name__}")
    tensors = [tensor.detach() for tensor in content]
    _refuse_non_finite(path, {f"tensor {number}": tensor for number, tensor in enumerate(tensors)})
    return tensors


def _read(path: Path) -> Any:
    """The content of a file of weights; errors as `read_checkpoint`."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    check_weight_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        is_zip = zipfile.is_zipfile(path)  # Older files cannot be mapped into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # Both readers raise many types for one fact: this is no readable checkpoint.
        foreign = re.search(r"(?:GLOBAL|Unsupported class|Unsupported global:?) ([\w.]+\.\w+)", str(error))
        if isinstance(error, UnpicklingError) and foreign:
            raise ValueError(
                f"{path} cannot be read as a checkpoint: it holds more than tensors ({foreign[1]}), which could run "
                "code; look for a .safetensors version, or, if you trust its author, read it with "
                "torch.load(FILE, weights_only=False) and write its tensors with safetensors.torch.save_file"
            ) from error
        reason = re.sub(r"\x1b\[[0-9;]*m", "", (str(error).splitlines() or [type(error).__name__])[0])
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error


def _refuse_non_finite(path: str | Path, state: Mapping[str, Tensor]) -> None:
    if (key := find_non_finite(state)) is not None:
        raise ValueError(f"{path} is damaged: {key} holds nan or infinite values")


def find_non_finite(state: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds nan or infinite values, if there is one."""
    for key, value in state.items():
        # Formats of one byte have no infinity; offloaded weights lie elsewhere.
        if value.is_floating_point() and value.itemsize > 1 and not value.is_meta and not value.isfinite().all():
            return key
    return None


def read_header(path: Path) -> dict[str, str]:
    """The texts in the header of a `.safetensors` file; none in other formats."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a checkpoint that may be nested in `state_dict`, `controlnet` or `model` and prefixed by `module.`.

    GLIGEN's files have their network in `model`. The alpha of a LoRA may be a plain number.
    """
    state: Mapping[str, Any] = checkpoint
    for key in ("state_dict", "controlnet", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    alphas = {
        k: torch.tensor(float(v)) for k, v in state.items() if k.endswith(".alpha") and isinstance(v, int | float)
    }
    return {key.removeprefix("module."): v for key, v in {**state, **alphas}.items() if isinstance(v, Tensor)}


def allocate(network: nn.Module, dtype: torch.dtype) -> None:
    """Gives parameters on the meta device memory on the default one, in `dtype` and with arbitrary values.

    Buffers are cast as well.
    """
    device = torch.get_default_device()
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))


def copy_weights(target: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Copies `state` into `target`, which must have the same names and shapes.

    Raises:
        ValueError: As `check_weights`; nothing has been copied then.
    """
    check_weights(target, state, source)
    with torch.no_grad():
        for key, value in _without_tables(target).items():
            value.copy_(state[key])


def check_weights(target: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Makes sure that `copy_weights` can copy.

    Raises:
        ValueError: Names every missing, unexpected and mis-shaped key at once; or the weights of the target are
            offloaded, where what is copied would be lost.
    """
    wanted, given = _without_tables(target), _without_tables(state)
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
    if offloaded := next((key for key, value in wanted.items() if value.is_meta and not given[key].is_meta), None):
        raise ValueError(
            f"{source} cannot be put in place of weights that are offloaded, e.g. {offloaded}; load it before "
            "enable_sequential_cpu_offload"
        )


def _without_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without sinusoidal position tables, which are computed."""
    return {key: value for key, value in state.items() if not key.endswith(".pe")}


def refuse_non_finite(pipe: Any, values: Tensor, where: str) -> None:
    """Makes sure that a result is neither nan nor infinite; `where` says what gave it.

    Raises:
        ValueError: It is; the message has the weights that are not finite themselves, or the way out.
    """
    if values.isfinite().all():
        return
    folder = f" of {pipe.name_or_path}" if pipe.name_or_path else ""
    for name, part in pipe.components.items():
        key = find_non_finite(part.state_dict()) if isinstance(part, nn.Module) else None
        if key is not None:
            raise ValueError(
                f"{where} gave nan or infinite values: weights of {name}{folder} are damaged, {key} holds such values"
            )
    is_half = values.dtype == torch.float16 or pipe.unet.dtype == torch.float16
    advice = "float16 ends at 65504, so try float32 or bfloat16" if is_half else "a scale may be too large"
    raise ValueError(f"{where} gave nan or infinite values, though all weights are finite; {advice}")
