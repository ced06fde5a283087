"""SMCD's stages: what they see and drop, who learns how fast, and that a run is assembled and resumed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_WORLD, open_gates, tiny_gates
from PIL import Image
from safetensors.torch import load_file

from imageconductor.checkpoints.assembly import AssemblyConfig, assemble
from imageconductor.commands import assemble as assemble_command
from imageconductor.conditioning import Boxes, build_flow_map
from imageconductor.data.batches import collate
from imageconductor.models.adapters import active
from imageconductor.models.gating import gate_scalars
from imageconductor.sampling.job import SampleJob, load_pipeline, prepare, render
from imageconductor.sampling.loras import find_job_loras
from imageconductor.sampling.pipeline import ImageConductorPipeline
from imageconductor.training import checkpointing
from imageconductor.training.run import check_inputs, run_stage
from imageconductor.training.stage_configs import load_config

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/train/*/*.yaml"))
T = torch.tensor([500])
FRAMES = TINY_WORLD.num_frames


def generators(count=1, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def batch_of(data, boxes, count=1):
    samples = [data.samples[i] for i in range(count)]
    return collate([{**sample, "boxes": boxes} for sample in samples])


def some_boxes(frames, size=(32, 32)):
    xyxy = torch.tensor([[[4.0, 4.0, 16.0, 20.0]] * frames, [[8.0, 8.0, 30.0, 31.0]] * frames])
    return Boxes(xyxy, torch.ones(2, frames, dtype=torch.bool), ("red circle", "blue star"), size)


def test_single_frames_are_seen_without_motion_modules_and_without_a_picture(configure, build):
    stage, data = build(configure("object_gates", boxes_dropout=0.0))
    open_gates(stage.object_gates)
    x_0, condition = stage.encode(batch_of(data, some_boxes(1)), generators())
    assert x_0.shape[2] == 1
    assert condition.keyframes is None
    assert condition.scene is None
    assert condition.boxes.shape == (1, 1, 2, 4)
    torch.testing.assert_close(condition.boxes[0, 0, 1], torch.tensor([8, 8, 30, 31]) / 32)
    assert condition.present[0, 0].tolist() == [1, 1]
    before = stage.denoise(x_0, T, condition)
    for name, parameter in stage.unet.named_parameters():
        if "motion_modules" in name:
            parameter.data.normal_()
    assert torch.equal(stage.denoise(x_0, T, condition), before)


def test_clips_are_seen_with_motion_modules_and_their_first_frame(configure, build):
    settings = {"num_frames": FRAMES, "first_frame": True, "places": ["up_blocks"], "boxes_dropout": 0.0}
    stage, data = build(configure("object_gates", **settings))
    assert all(name.startswith("up_blocks") for name in stage.object_gates.config.places)
    x_0, condition = stage.encode(batch_of(data, some_boxes(FRAMES)), generators())
    assert x_0.shape[2] == FRAMES
    assert condition.keyframes.any()
    before = stage.denoise(x_0, T, condition)
    for name, parameter in stage.unet.named_parameters():
        if "motion_modules" in name:
            parameter.data.normal_()
    assert not torch.equal(stage.denoise(x_0, T, condition), before)


def test_names_are_what_sampling_reads(configure, build):
    stage, data = build(configure("object_gates", boxes_dropout=0.0))
    _, condition = stage.encode(batch_of(data, some_boxes(1)), generators())
    expected = stage.networks.encode_names(["red circle", "blue star"])
    torch.testing.assert_close(condition.names[0], expected)
    alone = collate([{**data.samples[i], "boxes": some_boxes(1).select(range(i + 1))} for i in range(2)])
    _, condition = stage.encode(alone, generators(2))
    assert condition.present[:, 0].tolist() == [[1, 0], [1, 1]]
    assert not condition.names[0, 1].any()


def test_each_part_is_dropped_by_itself_and_as_often_as_told(configure, build):
    config = configure("scene_gates", scene_dropout=0.1, input_dropout=0.25, boxes_dropout=0.4, image_dropout=0.5)
    stage, data = build(config)
    count, drawn = 300, []
    batch = batch_of(data, some_boxes(FRAMES))
    stage.draw_latents = lambda *_: (torch.ones(1, 4, FRAMES, 2, 2), torch.ones(1, 4, FRAMES, 2, 2), (32, 32))
    stage.encode_text = lambda *_: torch.zeros(1, 5, 16)
    stage._features = {"red circle": torch.ones(16), "blue star": torch.ones(16)}
    for seed in range(count):
        _, c = stage.encode(batch, generators(seed=seed))
        assert bool(c.boxes.any()) == bool(c.present.any()) == bool(c.names.any()), "a box, its mask and its name"
        drawn.append([bool(x.any()) for x in (c.scene, c.input_frame, c.present, c.keyframes)])
    kept = np.array(drawn)
    assert kept.mean(axis=0) == pytest.approx([0.9, 0.75, 0.6, 0.5], abs=0.08)
    assert np.abs(np.corrcoef(kept.T) - np.eye(4)).max() < 0.2
    with stage.without_dropout():
        _, c = stage.encode(batch, generators(seed=3))
    assert all(bool(x.any()) for x in (c.scene, c.input_frame, c.present, c.keyframes))


def test_an_object_of_a_drawn_clip_has_its_box_the_track_of_its_middle_or_both(configure, build):
    settings = {"num_frames": FRAMES, "first_frame": True, "boxes_dropout": 0.0, "tracks_prob": 0.5}
    stage, data = build(configure("object_gates", **settings))
    xyxy = torch.stack([torch.tensor([2.0, 2, 10, 12]) + 2 * t for t in range(FRAMES)])
    boxes = Boxes(torch.stack([xyxy, xyxy.flip(0)]), torch.ones(2, FRAMES, dtype=torch.bool), ("a", "b"), (32, 32))
    flows = {}
    for chosen in ((0,), (1,), (0, 1)):
        centres = boxes.select(chosen).centres()
        flows[chosen] = build_flow_map(centres, stage.motion_controlnet.flow_convention)[0]
    stage.draw_latents = lambda *_: (torch.ones(1, 4, FRAMES, 2, 2), torch.ones(1, 4, FRAMES, 2, 2), (32, 32))
    stage.encode_text = lambda *_: torch.zeros(1, 5, 16)
    stage._features = {name: torch.ones(16) for name in ("a", "b")}
    seen = []
    for seed in range(80):
        _, condition = stage.encode(batch_of(data, boxes), generators(seed=seed))
        boxed = condition.present[0].bool()
        assert torch.equal(boxed.all(0), boxed.any(0)), "in all frames or none"
        has_box, tracked = boxed[0].tolist(), ()
        if condition.has_flow[0]:
            tracked = next(chosen for chosen, flow in flows.items() if torch.allclose(condition.flow[0], flow))
        assert (
            condition.names[0].bool().any(-1).tolist() == condition.boxes[0].bool().any(-1).any(0).tolist() == has_box
        )
        assert all(has or n in tracked for n, has in enumerate(has_box))
        seen += [(has, n in tracked) for n, has in enumerate(has_box)]
    shares = [seen.count(kind) / len(seen) for kind in ((True, False), (True, True), (False, True))]
    assert shares == pytest.approx([1 / 2 + 1 / 6, 1 / 6, 1 / 6], abs=0.08)
    with stage.without_dropout():
        _, condition = stage.encode(batch_of(data, boxes), generators(seed=1))
    assert condition.flow is None
    assert condition.present.all()


def test_tracks_are_told_by_the_motion_controlnet_as_the_model_samples_and_it_does_not_learn(configure, build):
    stage, data = build(configure("object_gates", num_frames=FRAMES, first_frame=True, tracks_prob=1.0))
    assert all(name.startswith("object_gates.") for group in stage.trainable().values() for name in group.parameters)
    x_0, condition = stage.encode(batch_of(data, some_boxes(FRAMES)), generators())
    moved = replace(condition, flow=torch.randn_like(condition.flow), has_flow=torch.tensor([True]))
    expected = stage.denoiser(x_0, T, moved)
    with active(stage.motion_controlnet, "object"):
        assert torch.equal(stage.denoise(x_0, T, moved), expected)
    with active(stage.motion_controlnet):
        assert not torch.equal(stage.denoise(x_0, T, moved), expected)


def test_without_the_controlnet_the_gates_carry_the_first_frame_alone(configure, build):
    stage, data = build(configure("scene_gates", first_frame_by="gates"))
    _, condition = stage.encode(batch_of(data, some_boxes(FRAMES)), generators())
    assert condition.keyframes is None
    torch.testing.assert_close(condition.scene, condition.input_frame)
    pixels = data.samples[0]["pixel_values"][None, :, :1]
    mean, _, _ = stage._encode_clips({"pixel_values": pixels})
    torch.testing.assert_close(condition.scene, mean[:, :, 0])


def test_scalars_of_the_gates_learn_at_a_rate_of_their_own_and_are_logged(configure, build):
    config = configure("object_gates", learning_rate=1e-3, gate_learning_rate=0.1, max_steps=3)
    stage, _ = build(config)
    groups = stage.trainable()
    assert groups["gates"].parameters.keys() == {f"object_gates.{name}" for name in gate_scalars(stage.object_gates)}
    assert (groups["gates"].learning_rate, groups["gates"].weight_decay) == (0.1, 0.0)
    assert groups["object_gates"].learning_rate is None
    run_stage(config)
    logged = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    opened = [line["object_gates"] for line in logged]
    assert opened[0] == pytest.approx(np.tanh(0.1), rel=0.02), "Adam's first step is the learning rate"
    assert opened == sorted(opened)
    assert logged[0]["learning_rate_1"] == pytest.approx(0.1)


def test_a_killed_run_is_the_uninterrupted_one(configure, tmp_path):
    whole = configure("scene_gates", max_steps=4)
    run_stage(whole)
    halves = configure("scene_gates", max_steps=4, output=str(tmp_path / "halves"))
    shutil.copytree(whole.output, halves.output)
    for step in (3, 4):
        shutil.rmtree(Path(halves.output) / f"checkpoint-{step:08d}")
    shutil.rmtree(Path(halves.output) / "scene_gates")
    run_stage(halves)
    for name in ("parameters",):
        a, b = (checkpointing.latest(Path(run.output)).tensors[name] for run in (whole, halves))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert (Path(halves.output) / "scene_lora" / "pytorch_lora_weights.safetensors").is_file()


def test_trained_gates_join_the_model_and_play(configure, tiny_model, tmp_path):
    first = configure("object_gates", output=str(tmp_path / "first"))
    run_stage(first)
    second = configure("scene_gates", output=str(tmp_path / "second"), object_gates=f"{first.output}/object_gates")
    run_stage(second)
    gates = {"object_gates": f"{first.output}/object_gates", "scene_gates": f"{second.output}/scene_gates"}
    config = AssemblyConfig(recipe="trained", model=str(tiny_model), dtype="float32", **gates)
    ImageConductorPipeline.from_assembly(assemble(config)).save_pretrained(tmp_path / "model")
    pipe = ImageConductorPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": "star", "num_inference_steps": 1, "output_type": "latent", "seed": 0, "num_frames": 4}
    plain = pipe(**given).frames
    assert (pipe(**given, boxes=some_boxes(4)).frames - plain).abs().max() > 0
    sources = json.loads((tmp_path / "model" / "sources.json").read_text())["sources"]
    assert {"object_gates", "scene_gates"} <= sources.keys()
    assert (tmp_path / "model" / "training" / "scene_gates.yaml").is_file()


@pytest.mark.slow
def test_the_lora_of_the_scene_gates_goes_into_the_model_and_acts_where_they_act(
    configure, build, tiny_model, tmp_path
):
    run = Path(configure("scene_gates", learns_object_gates=True, learning_rate=1e-2).output)
    run_stage(configure("scene_gates", learns_object_gates=True, learning_rate=1e-2))
    parts = [f"{name}={run / name}" for name in ("object_gates", "scene_gates")]
    recipe = ["--config", "configs/model/boxes.yaml", f"model={tiny_model}", "dtype=float32", *parts, "--output"]
    assert assemble_command.main([*recipe, str(tmp_path / "model")]) == 0
    some_boxes(4).save(tmp_path / "boxes.json")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    drawn = SampleJob(model=str(tmp_path / "model"), image=str(tmp_path / "red.png"), num_frames=4, device="cpu")
    boxed = replace(drawn, boxes=str(tmp_path / "boxes.json"))
    own = (str(tmp_path / "model" / "scene_lora" / "pytorch_lora_weights.safetensors"), 1.0)
    for job, loras in ((drawn, []), (replace(boxed, first_frame_by="controlnet"), []), (boxed, [own])):
        inputs = prepare(replace(job, steps=1, seed=[1]))
        assert find_job_loras(inputs.job)[1] == loras
    # Gates that go on learning do so with the LoRA that they act with.
    going_on = configure("scene_gates", model=str(tmp_path / "model"), object_gates=None, output=str(tmp_path / "more"))
    stage, _ = build(going_on)
    saved = load_file(run / "scene_lora" / "pytorch_lora_weights.safetensors")
    ups = {name: p for name, p in stage.unet.named_parameters() if ".lora_B." in name}
    assert len(ups) == len(saved) // 2
    assert sum(float(p.abs().sum()) for p in ups.values()) == pytest.approx(
        sum(float(value.abs().sum()) for key, value in saved.items() if key.endswith(("lora_B.weight", "up.weight"))),
        rel=1e-3,
    )
    with pytest.raises(ValueError, match=r"act with a LoRA of rank .*, with which they go on: set motion_lora_rank="):
        run_stage(replace(going_on, motion_lora_rank=0))
    fresh, _ = build(replace(going_on, fresh_scene_gates=True))
    assert not any(p.any() for name, p in fresh.unet.named_parameters() if ".lora_B." in name)
    videos = []
    for _ in range(2):
        videos.append(render(load_pipeline(inputs.job), [inputs])[0][0])
        shutil.rmtree(tmp_path / "model" / "scene_lora", ignore_errors=True)
    assert (videos[0] != videos[1]).any()
    # Other gates come without the LoRA, which was trained with those that they replace.
    shutil.copytree(run / "scene_gates", tmp_path / "others")
    assert assemble_command.main([*recipe, str(tmp_path / "again")]) == 0
    again = ["--config", "configs/model/boxes.yaml", f"model={tmp_path / 'again'}", "object_gates=null"]
    assert assemble_command.main([*again, "scene_gates=null", "--output", str(tmp_path / "kept")]) == 0
    assert assemble_command.main([*again, f"scene_gates={tmp_path / 'others'}", "--output", str(tmp_path / "new")]) == 0
    assert [(tmp_path / name / "scene_lora").is_dir() for name in ("kept", "new")] == [True, False]


def test_gates_of_another_model_are_refused(tiny_model, object_gates, tmp_path):
    folder = tmp_path / "object_gates"
    shutil.copytree(object_gates, folder)
    settings = json.loads((folder / "config.json").read_text())
    name = next(iter(settings["places"]))
    settings["places"][name][1:] = [1, settings["places"][name][1] * settings["places"][name][2]]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"is for another model: its gate {name} of .* here"):
        assemble(AssemblyConfig(recipe="trained", model=str(tiny_model), object_gates=str(folder)))


@pytest.mark.parametrize(
    ("stage", "changes", "error", "message"),
    [
        ("scene_gates", {"object_gates": None}, FileNotFoundError, "has no object gates; name those of a run"),
        ("scene_gates", {"object_gates": "nowhere"}, FileNotFoundError, "no object gates at nowhere"),
        ("scene_gates", {"max_objects": 3}, ValueError, "are made for 4 objects, absent ones included"),
        (
            "scene_gates",
            {"knows_places": True},
            ValueError,
            "knows_places=true is of fresh gates, and those at .* have knows_places=false; .* fresh_object_gates=true",
        ),
        (
            "scene_gates",
            {"tells_motion": True},
            ValueError,
            "for a UNet that reads the first frame, and that of .* does",
        ),
        ("object_gates", {"max_objects": 1}, ValueError, "up to world.max_sprites=3 objects, more than max_objects=1"),
        ("object_gates", {"data": ["nowhere"]}, FileNotFoundError, "no clips with boxes at nowhere"),
    ],
)
def test_what_is_missing_is_told_before_weights_are_read(configure, stage, changes, error, message, monkeypatch):
    monkeypatch.setattr("imageconductor.training.run.Networks.load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(error, match=message):
        run_stage(configure(stage, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_frame": True}, "would show all of a single frame"),
        ({"knows_first_boxes": True}, "knows_first_boxes=true tells nothing of single frames"),
        ({"tells_motion": True}, "moves a first frame that is not shown; set first_frame=true"),
        ({"fresh_object_gates": True, "object_gates": "some"}, "begins anew, and object_gates=some goes on"),
        ({"tracks_prob": 0.5}, "tracks_prob=0.5 draws tracks, and single frames have none"),
        ({"tracks_prob": 1.5, "num_frames": 4}, r"tracks_prob must lie in \[0, 1\], got 1.5"),
        ({"max_objects": 0}, "max_objects must be at least 1"),
        ({"data": {"a": 1}}, "data must be a list"),
        ({"gate_learning_rate": -1.0}, "gate_learning_rate must be positive"),
        ({"random_crop": 0.0}, "random_crop must lie in"),
    ],
)
def test_bad_settings(configure, changes, message):
    with pytest.raises(ValueError, match=message):
        configure("object_gates", **changes)


def test_closed_object_gates_that_do_not_learn_are_refused(configure):
    with pytest.raises(ValueError, match=r"fresh_object_gates=true gives closed gates.* set learns_object_gates=true"):
        configure("scene_gates", object_gates=None, fresh_object_gates=True)
    configure("scene_gates", learns_object_gates=True, fresh_object_gates=True)


@pytest.mark.parametrize("path", [path for path in CONFIGS if "gates" in path.stem or "joint" in path.stem], ids=str)
def test_the_configs_load(path):
    assert load_config(path).stage in ("object_gates", "scene_gates")


def test_previews_are_of_clips_with_boxes(configure):
    from imageconductor.sampling.preview import VideoPreview

    config, made = configure("object_gates", preview_every=2, preview_steps=1), []
    run_stage(config, lambda *given: made.append(VideoPreview(*given)) or made[0])
    assert all(clip["boxes"].num_objects for clip in made[0].clips)
    assert (Path(config.output) / "previews" / "step-00000002.png").stat().st_size > 1000


def test_inputs_are_checked_for_single_frames_without_controlnets(configure):
    check_inputs(configure("object_gates"))


def test_gates_of_the_folder_are_the_ones_that_act(configure, build, object_gates):
    stage, _ = build(configure("scene_gates"))
    saved = load_file(object_gates / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(dict(stage.object_gates.state_dict()), saved, rtol=0, atol=0)
    assert not any(p.requires_grad for p in stage.object_gates.parameters())


def test_fresh_gates_begin_anew_where_the_model_has_some(configure, build, gated_model):
    own, _ = build(configure("object_gates", model=str(gated_model), max_objects=4))
    fresh = configure("object_gates", model=str(gated_model), fresh_object_gates=True, knows_places=True, max_objects=5)
    anew, _ = build(fresh)
    assert own.measures()["object_gates"] > 0
    assert anew.measures()["object_gates"] == 0
    assert (anew.object_gates.config.knows_places, anew.object_gates.max_objects) == (True, 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": True}, "parallel=true is of fresh gates, and those at .*scene_gates have parallel=false"),
        ({"frame_0_only": True}, "frame_0_only=true is of fresh gates"),
        ({"encoder_channels": [8, 32]}, r"encoder_channels=\[8, 32\] is .* have encoder_channels=\[8, 16\]"),
        ({"encoder_blocks": 2}, "encoder_blocks=2 is .* have encoder_blocks=1; .* or set fresh_scene_gates=true"),
        ({"places": ["mid_block"]}, r'places=\["mid_block"\] is .* have other places, down_blocks_1_attentions'),
        ({"places": ["nowhere"]}, "the UNet has no place nowhere for a gate"),
    ],
)
def test_settings_of_fresh_gates_are_refused_where_gates_of_others_go_on(configure, gated_model, changes, words):
    going_on = {"model": str(gated_model), "object_gates": None}
    with pytest.raises(ValueError, match=words):
        check_inputs(configure("scene_gates", **going_on, **changes))
    if "nowhere" not in words:
        check_inputs(configure("scene_gates", **going_on, **changes, fresh_scene_gates=True))


def test_gates_go_on_under_settings_that_say_the_same_or_nothing(configure, gated_model):
    going_on = {"model": str(gated_model), "object_gates": None}
    same = configure("scene_gates", **going_on, places=["down_blocks", "mid_block", "up_blocks"])
    check_inputs(same)
    nothing = {"encoder_channels": [256, 512, 1024, 1024], "encoder_blocks": 3, "places": None}  # the defaults
    check_inputs(replace(same, **nothing))
    # Fresh object gates have these places; there are scene gates elsewhere.
    check_inputs(replace(same, places=["mid_block"], fresh_object_gates=True, learns_object_gates=True))
    with pytest.raises(ValueError, match=r'places=\["up_blocks"\] is .* those at .*object_gates have other places'):
        check_inputs(configure("object_gates", model=str(gated_model), places=["up_blocks"]))


def test_joint_training_begins_from_fresh_gates_and_saves_both(configure):
    config = configure("scene_gates", learns_object_gates=True)
    run_stage(config)
    assert (Path(config.output) / "object_gates" / "config.json").is_file()
    assert (Path(config.output) / "scene_gates" / "config.json").is_file()


def test_closed_gates_leave_the_denoising_as_it_is(configure, build):
    stage, data = build(configure("scene_gates", learns_object_gates=True, motion_lora_rank=0))
    x_0, condition = stage.encode(batch_of(data, some_boxes(FRAMES)), generators())
    assert torch.equal(stage.denoise(x_0, T, condition), stage.denoise(x_0, T, condition.without_gates()))
    assert tiny_gates(stage.unet, is_open=False)[0].config.places == stage.object_gates.config.places
