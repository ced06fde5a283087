"""A call with boxes and a first frame of the gates, against a loop that evaluates everything plainly."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_gates, tiny_pipeline
from PIL import Image
from safetensors.torch import save_file

from imageconductor.checkpoints.personalise import fold_loras, load_motion_lora
from imageconductor.conditioning import Boxes, Trajectories, camera_preset
from imageconductor.models.denoiser import Condition
from imageconductor.models.gated_attention import ObjectGates, SceneGates
from imageconductor.models.motion_unet import MotionUNet
from imageconductor.sampling.branches import Control, plan
from imageconductor.sampling.inputs import build_conditions, check_inputs
from imageconductor.sampling.pipeline import ImageConductorPipeline
from imageconductor.sampling.preview import VideoPreview
from imageconductor.sampling.video import draw_boxes, to_uint8, upscale_for_viewing

SIZE, T, STEPS = (32, 32), 2, 2


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), dtype=np.uint8))


def some_boxes(size=SIZE, names=("a red circle", "star"), frames=T):
    scale = torch.tensor([*size, *size], dtype=torch.float64)
    xyxy = torch.tensor([[[0.1, 0.2, 0.5, 0.6]] * frames, [[0.4, 0.4, 0.9, 0.95]] * frames], dtype=torch.float64)
    xyxy[0, -1] += 0.1
    present = torch.ones(2, frames, dtype=torch.bool)
    present[1, -1] = False
    return Boxes(xyxy[: len(names)] * scale, present[: len(names)], names, size)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.object_gates, pipe.scene_gates = tiny_gates(pipe.unet)
    return pipe


def arguments(**given):
    common = {"image": picture(), "trajectories": camera_preset("pan-left", SIZE, T), "prompt": "a red circle"}
    defaults = {"control": "camera", "guidance_scale": 3.0, "trajectory_guidance_scale": 1.0}
    return {**common, **defaults, "boxes": some_boxes(), "num_inference_steps": STEPS, "num_frames": T, **given}


def run(pipe, seed=1, **given):
    return pipe(**arguments(**given), seed=seed, output_type="latent").frames


@torch.no_grad()
def plain_loop(pipe, weights, gated_steps=STEPS, seed=1, **given):
    """The sum of whole evaluations by their weights, each with nothing shared: {(text, adapters): weight}."""
    given = arguments(**given)
    inputs = check_inputs(pipe, given.pop("image"), given.pop("trajectories"), given.pop("prompt"), None, **given)
    conditions = build_conditions(pipe, inputs)
    conditions["no_scene"] = conditions["uncond"].without_scene()
    denoiser = pipe.denoiser
    sample = torch.randn(1, 4, T, 16, 16, generator=torch.Generator().manual_seed(seed))
    pipe.scheduler.set_timesteps(STEPS)
    for index, t in enumerate(pipe.scheduler.timesteps):
        total = torch.zeros_like(sample)
        for (text, adapters), weight in weights.items():
            condition = conditions[text] if index < gated_steps else conditions[text].without_gates()
            motion = denoiser.motion_residuals(t, condition, adapters)
            image = denoiser.image_residuals(t, condition)
            residuals = motion if image is None else image + motion
            total += weight * denoiser.decode(denoiser.encode(sample, t, condition), residuals)
        sample = pipe.scheduler.step(total, t, sample).prev_sample
    return sample


CAMERA, OBJECT = ("camera",), ("object",)


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ({}, {("uncond", CAMERA): -2, ("prompt", CAMERA): 3}),
        (
            {"scene_guidance_scale": 2.5},
            {("no_scene", CAMERA): -1.5, ("uncond", CAMERA): 2.5 - 3, ("prompt", CAMERA): 3},
        ),
        ({"scene_guidance_scale": 3.0, "first_frame_by": "gates"}, {("no_scene", CAMERA): -2, ("prompt", CAMERA): 3}),
        (
            {"scene_guidance_scale": 2.0, "control": "object", "camera_free_scale": 1.4},
            {("no_scene", ()): -1, ("uncond", ()): 2 - 3, ("prompt", ()): 3 - 1.4, ("prompt", OBJECT): 1.4},
        ),
    ],
    ids=["as-published", "nested", "gates-alone", "equation-5"],
)
def test_a_call_is_the_plain_sum_of_its_branches(pipe, given, weights):
    torch.testing.assert_close(run(pipe, **given), plain_loop(pipe, weights, **given), rtol=1e-4, atol=1e-4)


def test_gates_may_act_in_the_first_steps_alone(pipe):
    weights = {("uncond", CAMERA): -2, ("prompt", CAMERA): 3}
    half = run(pipe, gated_fraction=0.5)
    torch.testing.assert_close(half, plain_loop(pipe, weights, gated_steps=1), rtol=1e-4, atol=1e-4)
    assert (half - run(pipe)).abs().max() > 1e-3
    assert torch.equal(run(pipe, gated_fraction=0.0), run(pipe, boxes=None))


def test_a_model_with_gates_is_its_base_where_nothing_asks_for_them(pipe):
    base = ImageConductorPipeline(**{**pipe.components, "object_gates": None, "scene_gates": None})
    base.set_progress_bar_config(disable=True)
    assert torch.equal(run(pipe, boxes=None), run(base, boxes=None))
    assert torch.equal(run(pipe, boxes=None, image=None), run(base, boxes=None, image=None))
    assert (run(pipe, first_frame_by="controlnet") - run(pipe, boxes=None)).abs().max() > 1e-3, "boxes alone"
    assert (run(pipe, boxes=None, first_frame_by="both") - run(pipe, boxes=None)).abs().max() > 1e-3, (
        "first frame alone"
    )


def test_what_depends_on_no_box_is_evaluated_once(pipe, monkeypatch):
    """Two boxes, nested guidance, two videos: an encoder row for each text; ControlNets see only two texts."""
    calls = {}

    def count(owner, method, size):
        original = getattr(owner, method)

        def wrapper(self, *args, **kwargs):
            calls.setdefault((owner.__name__, method), []).append(size(*args))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, wrapper)

    count(MotionUNet, "encode", lambda x_t, *_: len(x_t))
    for network in (pipe.image_controlnet, pipe.motion_controlnet):
        count(type(network), "forward", lambda _t, text, *_: len(text))
    count(ObjectGates, "forward", lambda boxes, *_: len(boxes))
    count(SceneGates, "forward", lambda scene, *_: len(scene))
    run(pipe, seed=[1, 2], scene_guidance_scale=2.0)
    assert calls == {
        ("MotionUNet", "encode"): [3 * 2] * STEPS,
        ("ImageControlNet", "forward"): [2] * STEPS,
        ("MotionControlNet", "forward"): [2] * STEPS,
        ("ObjectGates", "forward"): [3 * 2],  # in the first step, for all of them
        ("SceneGates", "forward"): [3 * 2],
    }


def test_videos_of_several_boxes_are_those_of_each(pipe):
    """Objects that one clip has less than another are absent ones, as those up to the model's number are."""
    both = [some_boxes(names=("star",)), some_boxes()]
    together = run(pipe, boxes=both)
    for n, boxes in enumerate(both):
        torch.testing.assert_close(together[n : n + 1], run(pipe, boxes=boxes), rtol=1e-4, atol=1e-4)


def test_boxes_are_cropped_as_the_image_is(pipe):
    """A wide frame loses its sides: boxes of the cropped picture are the same condition."""
    wide = some_boxes((64, 32)).crop((1, 1), (0, 0), (64, 32))
    conditions = []
    for boxes in (wide, wide.cover_crop(SIZE)):
        inputs = check_inputs(pipe, None, None, "star", None, boxes=boxes, num_frames=T)
        conditions.append(build_conditions(pipe, inputs)["prompt"])
    assert torch.equal(conditions[0].boxes, conditions[1].boxes)
    assert conditions[0].boxes.max() <= 1


def test_class_names_are_read_by_the_text_encoder(pipe):
    inputs = check_inputs(pipe, None, None, "star", None, boxes=some_boxes(), num_frames=T)
    condition = build_conditions(pipe, inputs)["uncond"]
    tokens = pipe.tokenizer(["star"], padding="max_length", max_length=5, truncation=True, return_tensors="pt")
    expected = pipe.text_encoder(tokens.input_ids).pooler_output
    torch.testing.assert_close(condition.names[:, 1], expected)
    assert condition.present[0].tolist() == [[1, 1], [1, 0]]


def test_gates_move_and_are_saved_with_the_other_networks(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = ImageConductorPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    # Not bit for bit: where weights lie in memory decides how MKL sums on CPUs without AVX-512.
    torch.testing.assert_close(run(again), run(pipe), atol=1e-4, rtol=1e-4)
    again.to(torch.float64)
    assert {again.object_gates.dtype, again.scene_gates.dtype} == {torch.float64}
    half = ImageConductorPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {half.object_gates.dtype, half.scene_gates.dtype} == {torch.bfloat16}
    assert set(half._exclude_from_cpu_offload) == {"object_gates", "scene_gates"}


def test_the_lora_of_scene_gates_is_saved_along_and_missed_where_they_act_without_it(pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path / "one")
    layer = "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"
    width = pipe.unet.get_submodule(layer.removeprefix("unet.")).weight.shape[0]
    pair = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
    (tmp_path / "one" / "scene_lora").mkdir()
    save_file(pair, tmp_path / "one" / "scene_lora" / "pytorch_lora_weights.safetensors")
    ImageConductorPipeline.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = ImageConductorPipeline.from_pretrained(tmp_path / "two")
    again.set_progress_bar_config(disable=True)
    run(again, first_frame_by="controlnet", boxes=None)
    assert not caplog.messages
    run(again)
    (said,) = caplog.messages
    assert f"load_motion_lora(pipe, '{tmp_path}/two/scene_lora', 'scene')" in said
    load_motion_lora(again, tmp_path / "two" / "scene_lora", "scene")
    run(again)
    fold_loras(again)
    run(again)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"boxes": some_boxes(frames=3)}, "the video has 2 frames, its boxes 3"),
        ({"boxes": camera_preset("pan-left", SIZE, T)}, "boxes must be imageconductor.conditioning.Boxes, got Traj"),
        (
            {"boxes": Boxes.from_tracks(Trajectories.from_tracks([[(9, 9)]] * 5, SIZE, T), (4, 4), ["star"] * 5)},
            "5 obj",
        ),
        ({"boxes": some_boxes(names=("star " * 99,))}, "class name .* tokens, at most"),
        ({"boxes": some_boxes(names=("<|endoftext|>",))}, "does not know the class name"),
        ({"boxes": [some_boxes()] * 3, "prompt": ["star"] * 2}, "expected 1 or 3"),
        ({"first_frame_by": "adapter"}, "first_frame_by must be one of controlnet, gates, both, got 'adapter'"),
        ({"first_frame_by": "gates", "image": None}, "needs a picture of frame 0"),
        ({"first_frame_by": "gates", "image": {0: picture(), 1: picture()}}, "frame 1 has a picture"),
        ({"boxes": None, "scene_guidance_scale": 2.0}, "none acts; give boxes"),
        ({"boxes": None, "gated_fraction": 0.5}, "none acts; give boxes"),
        ({"gated_fraction": 1.5}, "gated_fraction must be from 0 to 1"),
        ({"scene_guidance_scale": float("nan")}, "scene_guidance_scale"),
    ],
)
def test_bad_input(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **given)


def test_a_model_without_gates_says_so():
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="boxes need object gates, which this model does not have"):
        run(pipe)
    with pytest.raises(ValueError, match="first_frame_by 'both' needs scene gates"):
        run(pipe, boxes=None, first_frame_by="both")


def test_dropping_the_scene_leaves_absent_objects_and_zeros():
    full = Condition(torch.ones(1, 2, 3), boxes=torch.ones(1, 1, 1, 4), present=torch.ones(1, 1, 1))
    full = replace(full, names=torch.ones(1, 1, 3), scene=torch.ones(1, 4, 2, 2), input_frame=torch.ones(1, 4, 2, 2))
    dropped = full.without_scene()
    assert not any(x.any() for x in (dropped.present, dropped.scene, dropped.input_frame))
    assert dropped.boxes is full.boxes
    assert dropped.text is full.text


@pytest.mark.parametrize("scene", [1.0, 2.5])
def test_weights_sum_to_one(scene):
    for mix in (None, {Control.CAMERA: 0.5}):
        branches = plan(Control.CAMERA, 7.5, None, 1.0, True, mix, scene)
        assert sum(branch.weight for branch in branches) == pytest.approx(1)
        assert ("no_scene" in {branch.text for branch in branches}) == (scene != 1)


def test_a_preview_is_made_with_the_boxes_and_shows_them(pipe, monkeypatch, tmp_path):
    sheets = []
    monkeypatch.setattr("imageconductor.sampling.preview.contact_sheet", lambda _, rows: sheets.extend(rows))
    first = np.array(picture())
    pixels = torch.from_numpy(first).permute(2, 0, 1)[:, None].expand(-1, T, -1, -1)
    clip = {"pixel_values": pixels, "caption": "a red circle", "boxes": some_boxes()}
    VideoPreview([clip], None, tmp_path, {"num_inference_steps": 1})(2, SimpleNamespace(parts=pipe.components))
    given = arguments(trajectories=None, control="object", guidance_scale=None, num_inference_steps=1)
    made = pipe(**given, seed=0, output_type="np").frames[0]
    for (_, shown), frames in zip(sheets, (np.stack([first] * T), to_uint8(made)), strict=True):
        large, factor = upscale_for_viewing(frames)
        assert np.array_equal(shown, draw_boxes(large, some_boxes(), factor))
        assert not np.array_equal(shown, large)
