"""Guidance by text, camera, trajectories, and boxes or the first frame, as the linear combinations they are."""

from collections.abc import Sequence

from torch import Tensor


def classifier_free_guidance(eps_uncond: Tensor, eps_text: Tensor, text: float) -> Tensor:
    """Prediction that follows the text more closely than the model alone.

    Args:
        eps_uncond: (B, C, T, h, w), unconditional prediction, or the one for a negative prompt.
        eps_text: (B, C, T, h, w), prediction for the prompt.
        text: lambda_cfg, 1 = off.

    Returns:
        (B, C, T, h, w), eps_uncond + lambda_cfg (eps_text - eps_uncond).

    Source: Ho & Salimans 2022.
    """
    return eps_uncond + text * (eps_text - eps_uncond)


def camera_free_guidance(
    eps_uncond: Tensor, eps_base: Tensor, eps_object: Tensor, text: float, camera_free: float
) -> Tensor:
    """Prediction that follows the text and the object trajectories but not the camera.

    The sampler does not call it on predictions but on unit vectors, one for each evaluation of the model: the result is
    the weight of each, and evaluations whose weight is zero are left out (`sampling.branches.plan`).

    Args:
        eps_uncond: (B, C, T, h, w), prediction for the negative prompt by theta_0, the motion ControlNet without LoRA.
        eps_base: (B, C, T, h, w), prediction for the prompt by theta_0.
        eps_object: (B, C, T, h, w), prediction for the prompt by theta_trajs, the motion ControlNet under the object
            LoRA.
        text: lambda_cfg, 1 = off.
        camera_free: lambda_trajs. 0 leaves classifier-free guidance of theta_0.

    Returns:
        (B, C, T, h, w), Eq. 5.

    Source: Image Conductor, section 2.5. docs/decisions.md, 6 says what lambda_trajs = 1 means.
    """
    return classifier_free_guidance(eps_uncond, eps_base, text) + camera_free * (eps_object - eps_base)


def trajectory_guidance(guided: Tensor, eps_drawn: Tensor, eps_undrawn: Tensor, trajectories: float) -> Tensor:
    """Prediction that follows the trajectories more closely than the model alone.

    Args:
        guided: (B, C, T, h, w), prediction under the guidance above.
        eps_drawn: (B, C, T, h, w), prediction for the prompt with the trajectories, under the control's adapters.
        eps_undrawn: (B, C, T, h, w), prediction for the prompt with the motion ControlNet left out.
        trajectories: Scale, 1 = off.

    Returns:
        (B, C, T, h, w), guided + (trajectories - 1) (eps_drawn - eps_undrawn).

    Source: docs/decisions.md, 27; beyond the paper and the release.
    """
    return guided + (trajectories - 1) * (eps_drawn - eps_undrawn)


def mixed_guidance(
    eps_uncond: Tensor, eps_undrawn: Tensor, eps_drawn: Sequence[Tensor], text: float, mix: Sequence[float]
) -> Tensor:
    """Prediction that follows each motion control as strongly as its weight says.

    Args:
        eps_uncond: (B, C, T, h, w), prediction for the negative prompt with the motion ControlNet left out.
        eps_undrawn: (B, C, T, h, w), prediction for the prompt with the motion ControlNet left out.
        eps_drawn: For each control (B, C, T, h, w), prediction for the prompt under the control's adapters.
        text: lambda_cfg, 1 = off.
        mix: Weight of each control, 0 = off; below 0 it moves the other way.

    Returns:
        (B, C, T, h, w), classifier-free guidance of the model without trajectories
        + sum_k mix_k (eps_drawn_k - eps_undrawn).

    Source: docs/decisions.md, 38; beyond the paper and the release. With text guidance off, a single control of weight
    w is `trajectory_guidance` at scale w.
    """
    guided = classifier_free_guidance(eps_uncond, eps_undrawn, text)
    for weight, drawn in zip(mix, eps_drawn, strict=True):
        guided = guided + weight * (drawn - eps_undrawn)
    return guided


def scene_guidance(guided: Tensor, eps_scene: Tensor, eps_without: Tensor, scene: float) -> Tensor:
    """Prediction that follows boxes and the first frame of the gates more closely than the model alone.

    With classifier-free guidance this is the nested form in which each scale multiplies what one more condition
    changes. At scene = 1 it is the published rule. Published variants that add a whole prediction to it, with weights
    that sum to 2, 3 or 4, are not offered.

    Args:
        guided: (B, C, T, h, w), prediction under the guidance above, all of it with the scene.
        eps_scene: (B, C, T, h, w), prediction for the negative prompt with the scene.
        eps_without: (B, C, T, h, w), prediction for the negative prompt without it: absent boxes, and zeros in place of
            the first frame's latents.
        scene: s_img, 1 = off.

    Returns:
        (B, C, T, h, w), guided + (scene - 1) (eps_scene - eps_without).

    Source: SMCD (arXiv 2403.10179), section 3, for scene = 1; docs/decisions.md, 39 for the rest.
    """
    return guided + (scene - 1) * (eps_scene - eps_without)
