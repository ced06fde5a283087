"""What computes, and in which precision: half precision only where the device has instructions for it."""

from __future__ import annotations

import gc
import logging
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of the half precisions by accelerate's names, those of `mixed_precision`."""

_ROCM_BFLOAT16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")  # AMD's architectures with such products


def free_memory() -> None:
    """Frees what nothing uses any more, such as networks that accelerate has prepared, which refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def has_instructions(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device computes products in half precision itself; a CPU that does not takes tens of times as long.

    Args:
        dtype: bfloat16 or float16.
        device: Of devices other than CPUs and CUDA's nothing is known, and the answer is no.
    """
    if device.type == "cuda":
        if dtype == torch.float16:
            return True
        if torch.version.hip is not None:  # The capability is the number of the architecture there.
            return torch.cuda.get_device_properties(device).gcnArchName.startswith(_ROCM_BFLOAT16)
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    # oneDNN also says yes to AVX-512 without its bfloat16 part; older versions of PyTorch cannot tell.
    tells = getattr(torch.cpu, "_is_avx512_bf16_supported", None) if platform.machine() in ("x86_64", "AMD64") else None
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and (tells is None or tells()))


def choose_precision(wanted: str, device: torch.device) -> str:
    """The `mixed_precision` of a training: `wanted`, or for "auto" bf16 where the device has instructions for it.

    Raises:
        ValueError: It is fp16, whose gradients are scaled on GPUs alone, and the device is a CPU.
    """
    if wanted == "auto":
        return "bf16" if has_instructions(torch.bfloat16, device) else "no"
    if wanted == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision=fp16 needs a GPU, and there is none; set mixed_precision=auto")
    if wanted in HALF:
        warn_of_imitation(HALF[wanted], device, f"mixed_precision={'fp16' if device.type == 'cuda' else 'auto'}")
    return wanted


def warn_of_imitation(dtype: torch.dtype, device: torch.device, remedy: str) -> None:
    """Warns where a device imitates a half precision, a CPU so slowly that the command seems to stand still."""
    if device.type in ("cpu", "cuda") and dtype in HALF.values() and not has_instructions(dtype, device):
        kind, name = {"cpu": "CPU", "cuda": "GPU"}[device.type], str(dtype).removeprefix("torch.")
        logger.warning(f"this {kind} has no instructions for {name} and imitates it, which is slow: {remedy} is faster")


def resident_peak_bytes() -> int:
    """The most main memory that this process has had; 0 under Windows, which does not tell."""
    if os.name == "nt":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def choose_device(name: str | None) -> str:
    """A device by its name; None = the first GPU, or the CPU where there is none.

    Raises:
        ValueError: It cannot be used here.
    """
    if name is None:
        warn_of_idle_gpu()
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a CPU build asked for CUDA
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def warn_of_idle_gpu() -> None:
    """Warns where PyTorch sees no GPU although a driver is installed, as with a build of PyTorch for CPUs."""
    driver = "NVIDIA" if shutil.which("nvidia-smi") else "AMD" if Path("/dev/kfd").exists() else None
    if driver is not None and not torch.cuda.is_available():
        logger.warning(
            f"{driver}'s driver is here, but PyTorch {torch.__version__} finds no GPU, so the CPU computes; "
            "README says how to install a build for it"
        )
