"""Half precision: which devices have instructions for it, and which only imitate it."""

from __future__ import annotations

import logging
import platform

import torch

logger = logging.getLogger(__name__)

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of the half precisions by accelerate's names, those of `mixed_precision`."""


def has_instructions(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device computes products in half precision itself; a CPU that does not takes ten times as long.

    Args:
        dtype: bfloat16 or float16.
        device: Of devices other than CPUs and CUDA's nothing is known, and the answer is no.
    """
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    # oneDNN also says yes to AVX-512 without its bfloat16 part; older versions of PyTorch cannot tell.
    tells = getattr(torch.cpu, "_is_avx512_bf16_supported", None) if platform.machine() in ("x86_64", "AMD64") else None
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and (tells is None or tells()))


def choose_precision(wanted: str, device: torch.device) -> str:
    """The `mixed_precision` of a training: `wanted`, or for "auto" bf16 where the device has instructions for it."""
    if wanted == "auto":
        return "bf16" if has_instructions(torch.bfloat16, device) else "no"
    if wanted in HALF:
        warn_of_imitation(HALF[wanted], device, "mixed_precision=auto")
    return wanted


def warn_of_imitation(dtype: torch.dtype, device: torch.device, remedy: str) -> None:
    """Warns where a CPU imitates a half precision, which looks as if the command stood still."""
    if device.type == "cpu" and dtype in HALF.values() and not has_instructions(dtype, device):
        name = str(dtype).removeprefix("torch.")
        logger.warning(f"this CPU has no instructions for {name} and takes many times as long as in float32: {remedy}")
