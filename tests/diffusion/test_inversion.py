"""The noise prior's mixture, and DDIM inversion on a model whose answer is known."""

import pytest
import torch
from diffusers import DDIMScheduler

from imageconductor.diffusion.inversion import ddim_inversion, mix_noise_prior


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_sampling_leads_back_from_the_inverted_noise(prediction_type):
    scheduler = DDIMScheduler(
        beta_schedule="linear", prediction_type=prediction_type, clip_sample=False, timestep_spacing="leading"
    )
    x_0 = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))

    def predict(x_t, t):
        return noise if prediction_type == "epsilon" else scheduler.get_velocity(x_0, noise, t)

    inverted = ddim_inversion(predict, x_0, scheduler, 50)
    alpha = scheduler.alphas_cumprod[980]
    assert torch.allclose(inverted, alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise, atol=2e-2)
    scheduler.set_timesteps(50)
    sample = inverted
    for t in scheduler.timesteps:
        sample = scheduler.step(predict(sample, t), t, sample).prev_sample
    assert torch.allclose(sample, x_0, atol=5e-2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_latents_of_a_standard_normal_world_are_their_own_noise(prediction_type):
    """There E[x_0 | x_t] = sqrt(alpha) x_t, so that the deterministic way from x_0 to noise goes nowhere."""
    scheduler = DDIMScheduler(beta_schedule="linear", prediction_type=prediction_type, clip_sample=False)
    x_0 = torch.randn(1, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))

    def predict(x_t, t):
        alpha = scheduler.alphas_cumprod[t]
        return {"epsilon": (1 - alpha).sqrt() * x_t, "v_prediction": 0 * x_t, "sample": alpha.sqrt() * x_t}[
            prediction_type
        ]

    assert torch.allclose(ddim_inversion(predict, x_0, scheduler, 100), x_0, rtol=0.02, atol=0)


@pytest.mark.parametrize("steps", [7, 30, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_join_where_they_do_not_divide_the_timesteps(steps, spacing):
    """Noise that is the same at all timesteps leads exactly to the last of them."""
    scheduler = DDIMScheduler(
        beta_schedule="linear", clip_sample=False, timestep_spacing=spacing, set_alpha_to_one=True
    )
    x_0, noise = (torch.randn(1, 4, 2, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    visited = []
    inverted = ddim_inversion(lambda _, t: visited.append(int(t)) or noise, x_0, scheduler, steps)
    last = scheduler.alphas_cumprod[visited[-1]]
    assert torch.allclose(inverted, last.sqrt() * x_0 + (1 - last).sqrt() * noise, atol=1e-4)


def test_what_cannot_be_inverted_is_told():
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="noise, v or x_0 can be inverted, the scheduler has 'flow'"):
        ddim_inversion(torch.add, torch.zeros(1, 4, 1, 2, 2), scheduler, 5)


def test_a_prior_keeps_the_variance_and_is_resized_frame_by_frame():
    generator = torch.Generator().manual_seed(0)
    noise, inverted = (torch.randn(2, 4, 3, 16, 16, generator=generator) for _ in range(2))
    assert mix_noise_prior(noise, inverted, 0.5).var().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(mix_noise_prior(noise, inverted, 0.0), noise)
    larger = mix_noise_prior(torch.zeros(2, 4, 3, 32, 24), inverted[:1], 1.0)
    assert larger.shape == (2, 4, 3, 32, 24)
    assert torch.equal(larger[0], larger[1])
    alone = mix_noise_prior(torch.zeros(1, 4, 1, 32, 24), inverted[:1, :, 1:2], 1.0)
    assert torch.allclose(larger[:1, :, 1:2], alone)


@pytest.mark.parametrize(
    ("shape", "fraction", "words"),
    [((1, 8, 3, 4, 4), 0.5, "8 channels"), ((1, 4, 5, 4, 4), 0.5, "5 frames"), ((1, 4, 3, 4, 4), 1.5, "got 1.5")],
)
def test_a_prior_that_does_not_fit_is_refused(shape, fraction, words):
    with pytest.raises(ValueError, match=words):
        mix_noise_prior(torch.zeros(1, 4, 3, 4, 4), torch.zeros(shape), fraction)
