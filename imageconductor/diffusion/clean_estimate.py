"""The clean latents that a prediction stands for."""

from __future__ import annotations

from torch import Tensor


def estimate_x_0(prediction: Tensor, x_t: Tensor, alpha_cumprod: float, prediction_type: str) -> Tensor:
    """Estimate of the clean latents at one step.

    Args:
        prediction: (B, C, T, h, w), output of the model, guided or not.
        x_t: (B, C, T, h, w), what the model saw: sqrt(alpha_cumprod) x_0 + sqrt(1 - alpha_cumprod) eps.
        alpha_cumprod: Of the timestep, in [0, 1].
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
