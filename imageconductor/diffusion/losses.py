"""The training objectives: Eqs. 1 and 3 (denoising) and Eq. 4 (orthogonality of the two LoRAs)."""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

OrthogonalTarget = Literal["identity", "zero"]


def denoising_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements, in float32: Eq. 1 on camera-only data, Eq. 3 on mixed data.

    Args:
        prediction: (B, C, T, h, w), eps_theta(x_t, t, c), or v where the scheduler predicts v.
        target: (B, C, T, h, w), the noise (or v).

    Raises:
        ValueError: The shapes differ; broadcasting would hide it.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    return F.mse_loss(prediction.float(), target.float())


def orthogonal_loss(pairs: Iterable[tuple[Tensor, Tensor]], target: OrthogonalTarget = "identity") -> Tensor:
    """Mean over layers of ||I - W_cam W_obj^T||^2, Eq. 4.

    Args:
        pairs: For each layer (W_cam, W_obj), LoRA's A matrices (r, in) or (r, in, kh, kw), so the product is (r, r).
        target: "identity" as printed; "zero" asks the two row spaces to be orthogonal.

    Returns:
        () float32; the squared Frobenius norm divided by r^2, so that one weight serves every rank.

    Raises:
        ValueError: No pairs, an unknown target, or shapes that differ.

    Source: Image Conductor, Eq. 4. The paper leaves open which matrix W is: docs/decisions.md.
    """
    if target not in ("identity", "zero"):
        raise ValueError(f"target must be 'identity' or 'zero', got {target!r}")
    terms: list[Tensor] = []
    for camera, obj in pairs:
        if camera.shape != obj.shape:
            raise ValueError(f"camera {tuple(camera.shape)} and object {tuple(obj.shape)} weights differ in shape")
        product = camera.detach().float().flatten(1) @ obj.float().flatten(1).T
        goal = torch.eye(len(product), device=product.device) if target == "identity" else torch.zeros_like(product)
        terms.append(F.mse_loss(product, goal))
    if not terms:
        raise ValueError("the orthogonal loss needs at least one layer that both LoRAs adapt")
    return torch.stack(terms).mean()
