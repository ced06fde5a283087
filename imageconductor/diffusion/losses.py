"""The training objectives.

Image Conductor: Eqs. 1 and 3 (denoising) and Eq. 4 (orthogonality of the two LoRAs). MotionDirector: L_org, which is
the denoising loss, and L_ad (appearance-debiased). Consistency distillation: pseudo-Huber.
"""

import math
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


def pseudo_huber_loss(prediction: Tensor, target: Tensor, width: float) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c over the differences d of all elements: squared below c, absolute above.

    Args:
        prediction: (B, C, T, h, w).
        target: (B, C, T, h, w).
        width: c.

    Raises:
        ValueError: The shapes differ.

    Source: Improved consistency training (arXiv 2310.14189), element by element.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    return (((prediction.float() - target.float()) ** 2 + width**2).sqrt() - width).mean()


def debias(values: Tensor, anchor: Tensor, beta: float = 1.0) -> Tensor:
    """Noise, or a prediction of it, less of what all frames of a clip share, its appearance above all.

    Args:
        values: (B, C, T, h, w).
        anchor: (B,) int64, the frame of each clip that is taken off all of its frames.
        beta: How much of it; 0 leaves the values as they are.

    Returns:
        (B, C, T, h, w), phi(e)_i = sqrt(beta^2 + 1) e_i - beta e_anchor, of unit variance again if e is noise.

    Source: MotionDirector (arXiv 2310.08465), appearance-debiased temporal loss.
    """
    index = anchor.view(-1, 1, 1, 1, 1).expand(-1, values.shape[1], 1, *values.shape[3:])
    return math.sqrt(beta**2 + 1) * values - beta * values.gather(2, index)


def debiased_loss(prediction: Tensor, target: Tensor, anchor: Tensor, beta: float = 1.0) -> Tensor:
    """Mean squared error after `debias`, MotionDirector's L_ad: an error that all frames share counts little.

    At beta = 1 such an error weighs 0.17 times, and one that is independent between frames 2.8 times, what they weigh
    in `denoising_loss`.

    Args:
        prediction: (B, C, T, h, w).
        target: (B, C, T, h, w).
        anchor: (B,) int64, as in `debias`.
        beta: As in `debias`.

    Raises:
        ValueError: The shapes differ.
    """
    return denoising_loss(debias(prediction.float(), anchor, beta), debias(target.float(), anchor, beta))


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
