"""The equations."""

import pytest
import torch

from imageconductor.diffusion.guidance import camera_free_guidance, classifier_free_guidance, scene_guidance
from imageconductor.diffusion.losses import denoising_loss, orthogonal_loss


def test_guidance_at_scale_one_is_the_conditional_output():
    null, text, obj = torch.randn(3, 1, 4, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(classifier_free_guidance(null, text, 1.0), text)
    torch.testing.assert_close(camera_free_guidance(null, text, obj, 1.0, 1.0), obj)
    torch.testing.assert_close(
        camera_free_guidance(null, text, obj, 3.0, 0.0), classifier_free_guidance(null, text, 3.0)
    )


def test_equation_5_in_numbers():
    null, base, obj = (torch.full((1, 1, 1, 1, 1), value) for value in (1.0, 2.0, 5.0))
    assert camera_free_guidance(null, base, obj, 8.5, 1.4).item() == pytest.approx(1 + 8.5 * 1 + 1.4 * 3)


@pytest.mark.parametrize(("scene", "text"), [(1.0, 7.5), (1.5, 7.5), (3.0, 1.0), (0.0, 4.0), (1.0, 1.0)])
def test_guidance_by_a_scene_weighs_to_one_and_is_linear(scene, text):
    without, uncond, prompt = torch.eye(3).double()

    def nested(without, uncond, prompt):
        return scene_guidance(classifier_free_guidance(uncond, prompt, text), uncond, without, scene)

    weights = nested(without, uncond, prompt)
    assert weights.tolist() == pytest.approx([1 - scene, scene - text, text])
    assert weights.sum().item() == pytest.approx(1)
    eps = torch.randn(3, 1, 4, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(nested(*eps), torch.einsum("k,k...->...", weights, eps))


def test_guidance_by_a_scene_is_guidance_by_the_text_without_it():
    without, uncond, prompt = torch.randn(3, 1, 4, 2, 3, 3, dtype=torch.float64)
    plain = classifier_free_guidance(uncond, prompt, 7.5)
    assert torch.equal(scene_guidance(plain, uncond, without, 1.0), plain)
    torch.testing.assert_close(
        scene_guidance(prompt, uncond, without, 2.0),
        classifier_free_guidance(without, uncond, 2.0) + prompt - uncond,
    )


@pytest.mark.parametrize(("target", "expected"), [("identity", (4 + 1 + 16 + 9) / 4), ("zero", (9 + 1 + 16 + 4) / 4)])
def test_equation_4_by_hand(target, expected):
    camera = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    obj = torch.tensor([[1.0, 4.0, 1.0], [1.0, -2.0, 0.0]])
    # camera @ obj.T = [[3, 1], [4, -2]]
    assert orthogonal_loss([(camera, obj)], target).item() == pytest.approx(expected)


def test_equation_4_flattens_convolutions_and_averages_layers():
    camera, obj = torch.randn(2, 3, 4, 3, 3)
    flat = orthogonal_loss([(camera.flatten(1), obj.flatten(1))], "zero")
    torch.testing.assert_close(orthogonal_loss([(camera, obj)], "zero"), flat)
    zero = (torch.zeros(3, 5), torch.zeros(3, 5))
    torch.testing.assert_close(orthogonal_loss([(camera, obj), zero], "zero"), flat / 2)


def test_equation_4_teaches_the_object_lora_alone():
    camera, obj = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    orthogonal_loss([(camera, obj)]).backward()
    assert camera.grad is None
    assert obj.grad is not None
    assert obj.grad.any()


def test_losses_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="differ in shape"):
        denoising_loss(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="differ in shape"):
        orthogonal_loss([(torch.zeros(2, 3), torch.zeros(2, 4))])
    with pytest.raises(ValueError, match="at least one layer"):
        orthogonal_loss([])
    with pytest.raises(ValueError, match="'identity' or 'zero'"):
        orthogonal_loss([(torch.zeros(2, 3), torch.zeros(2, 3))], "one")
