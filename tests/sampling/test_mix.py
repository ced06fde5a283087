"""Several motion controls at once, each with a weight."""

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image

from imageconductor.conditioning import camera_preset
from imageconductor.diffusion.guidance import classifier_free_guidance, mixed_guidance
from imageconductor.models.adapters import merge_copy
from imageconductor.sampling.branches import ADAPTERS, Control, plan
from imageconductor.sampling.pipeline import ImageConductorPipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def run(pipe, **arguments):
    """(1, C, 2, 16, 16) after two steps."""
    given = {
        "image": Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)),
        "trajectories": camera_preset("pan-left", (32, 32), 2),
        "prompt": "a red circle",
        "seed": 1,
        "num_inference_steps": 2,
        **arguments,
    }
    return pipe(num_frames=2, output_type="latent", **given).frames


def weights(branches):
    return {(branch.text, branch.adapters): branch.weight for branch in branches}


def test_the_plan_is_mixed_guidance():
    mix = {Control.CAMERA: 1.5, Control.OBJECT: -0.5, Control.BASE: 0.25}
    values = {
        (text, adapters): torch.randn(1, 4, 2, 3, 3, dtype=torch.float64)
        for text in ("uncond", "prompt")
        for adapters in (None, *ADAPTERS.values())
    }
    uncond, undrawn = values["uncond", None], values["prompt", None]
    expected = classifier_free_guidance(uncond, undrawn, 4.0)
    for control, weight in mix.items():
        expected = expected + weight * (values["prompt", ADAPTERS[control]] - undrawn)
    found = weights(plan(Control.OBJECT, 4.0, mix=mix))
    torch.testing.assert_close(sum(weight * values[key] for key, weight in found.items()), expected)
    assert sum(found.values()) == pytest.approx(1)
    drawn = [values["prompt", ADAPTERS[control]] for control in mix]
    torch.testing.assert_close(mixed_guidance(uncond, undrawn, drawn, 4.0, list(mix.values())), expected)


def test_it_is_linear_in_its_weights():
    uncond, undrawn, *drawn = torch.randn(4, 1, 4, 2, 3, 3, dtype=torch.float64)

    def guide(*mix):
        return mixed_guidance(uncond, undrawn, drawn, 3.0, mix)

    without = guide(0.0, 0.0)
    torch.testing.assert_close(without, classifier_free_guidance(uncond, undrawn, 3.0))
    one, other = guide(1.0, 0.5) - without, guide(-2.0, 4.0) - without
    torch.testing.assert_close(guide(2 * 1.0 - 2.0, 2 * 0.5 + 4.0) - without, 2 * one + other)


@pytest.mark.parametrize("control", Control)
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_one_control_without_text_guidance_is_trajectory_guidance(control, scale):
    assert weights(plan(Control.OBJECT, 1.0, mix={control: scale})) == pytest.approx(
        weights(plan(control, 1.0, None, scale))
    )


def test_controls_without_weight_are_not_run():
    mix = {Control.CAMERA: 0.0, Control.OBJECT: 1.0}
    assert set(weights(plan(Control.BASE, 1.0, mix=mix))) == {("prompt", ("object",))}
    assert set(weights(plan(Control.BASE, 2.0, mix={}))) == {("uncond", None), ("prompt", None)}
    assert plan(Control.BASE, 2.0, mix=mix, has_trajectories=False) == plan(Control.BASE, 2.0, has_trajectories=False)


def test_a_call_takes_it(pipe):
    common = {"guidance_scale": 1.0}
    expected = run(pipe, control="camera", trajectory_guidance_scale=1.5, **common)
    torch.testing.assert_close(run(pipe, mix={"camera": 1.5}, **common), expected)
    both = run(pipe, mix={"camera": 1.0, Control.OBJECT: 0.5})
    assert (both - run(pipe, mix={"camera": 1.0})).abs().max() > 1e-3
    assert torch.equal(run(pipe, mix={"camera": 0.0}), run(pipe, trajectories=None)), "all faders down"


def test_a_callback_may_change_it(pipe):
    """From nothing to a mix and back; the next step uses it, also where the mapping itself is changed."""
    first, mixed = [], {"camera": 1.0, "object": 0.5}

    def set_at(step_of, value):
        def callback(pipeline, step, t, tensors):
            first.append(tensors["latents"])
            if step == step_of:
                pipeline._mix = value

        return callback

    def start_from(latents):
        return lambda _pipe, step, _t, tensors: {"latents": latents} if step == 0 else tensors

    changed = run(pipe, control="camera", callback_on_step_end=set_at(0, mixed))
    assert torch.equal(changed, run(pipe, mix=mixed, callback_on_step_end=start_from(first[0])))
    back = run(pipe, control="camera", mix=mixed, callback_on_step_end=set_at(0, None))
    assert torch.equal(back, run(pipe, control="camera", callback_on_step_end=start_from(first[2])))
    given = dict(mixed)
    in_place = run(pipe, mix=given, callback_on_step_end=lambda p, *_: p._mix.update(camera=0.0))
    assert torch.equal(in_place, run(pipe, mix=mixed, callback_on_step_end=set_at(0, {"camera": 0.0, "object": 0.5})))
    assert given == mixed
    with pytest.raises(ValueError, match="control must be one of"):
        run(pipe, callback_on_step_end=set_at(0, {"zoom": 1.0}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mix": {"zoom": 1.0}}, "control must be one of camera, object, mixed, base, got 'zoom'"),
        ({"mix": {"camera": float("nan")}}, r"mix\['camera'\]"),
        ({"mix": 2.0}, "mix must be a mapping"),
        ({"mix": {"camera": 1.0}, "trajectory_guidance_scale": 2.0}, r"excludes .*trajectory_guidance_scale \(2.0\)"),
        ({"mix": {"object": 1.0}, "control": "object", "camera_free_scale": 1.5}, r"camera_free_scale \(1.5\)"),
    ],
)
def test_what_does_not_go_together_is_told(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **arguments)


def test_its_loras_must_be_there(pipe):
    without = {"motion_controlnet": merge_copy(pipe.motion_controlnet), "sampling_defaults": pipe.sampling_defaults}
    bare = ImageConductorPipeline(**{**pipe.components, **without})
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="control 'camera' needs the camera LoRA, which this model does not have"):
        run(bare, mix={"base": 1.0, "camera": 1.0})
    with pytest.raises(ValueError, match="needs the camera LoRA"):
        run(bare, control="base", callback_on_step_end=lambda p, *_: setattr(p, "_mix", {"camera": 1.0}))
    assert run(bare, mix={"base": 1.0}).isfinite().all()
