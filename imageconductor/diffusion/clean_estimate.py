"""The clean latents that a prediction stands for, and the prediction that stands for clean latents."""

from __future__ import annotations

from torch import Tensor


def estimate_x_0(prediction: Tensor, x_t: Tensor, alpha_cumprod: float | Tensor, prediction_type: str) -> Tensor:
    """Estimate of the clean latents at one step.

    Args:
        prediction: (B, C, T, h, w), output of the model, guided or not.
        x_t: (B, C, T, h, w), what the model saw: sqrt(alpha_cumprod) x_0 + sqrt(1 - alpha_cumprod) eps.
        alpha_cumprod: Of the timestep, in [0, 1]; a tensor has one for each video, (B, 1, 1, 1, 1).
        prediction_type: "epsilon", "v_prediction" or "sample", as diffusers' schedulers call what the model predicts.

    Returns:
        (B, C, T, h, w).

    Raises:
        ValueError: The model predicts something else.
    """
    signal, noise = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
    if prediction_type == "epsilon":
        return (x_t - noise * prediction) / signal
    if prediction_type == "v_prediction":
        return signal * x_t - noise * prediction
    if prediction_type == "sample":
        return prediction
    raise ValueError(f"x_0 follows from predictions of epsilon, v or the sample, the scheduler has {prediction_type!r}")


def prediction_of_x_0(x_0: Tensor, x_t: Tensor, alpha_cumprod: float, prediction_type: str) -> Tensor:
    """The prediction whose estimate of the clean latents is `x_0`; arguments as those of `estimate_x_0`.

    Returns:
        (B, C, T, h, w).

    Raises:
        ValueError: The model predicts something else, or `x_t` has no noise.
    """
    signal, noise = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
    if prediction_type == "sample":
        return x_0
    if noise == 0:
        raise ValueError("no prediction of noise follows from x_0 where x_t has no noise (alpha_cumprod is 1)")
    if prediction_type == "epsilon":
        return (x_t - signal * x_0) / noise
    if prediction_type == "v_prediction":
        return (signal * x_t - x_0) / noise
    raise ValueError(f"x_0 stands for predictions of epsilon, v or the sample, the scheduler has {prediction_type!r}")
