"""The generation command: what it writes, that it repeats, and how it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from imageconductor import config as config_file
from imageconductor.commands import sample
from imageconductor.conditioning.preset_names import CAMERA_PRESETS, OBJECT_PRESETS
from imageconductor.sampling.job import SampleJob, load_pipeline, prepare, render
from imageconductor.sampling.job_files import load_job, write


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "first.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def tracks(tmp_path):
    path = tmp_path / "tracks.json"
    drawn = {"width": 60, "height": 40, "tracks": [{"points": [[20, 10], [30, 20]]}, {"points": [[40, 30]]}]}
    path.write_text(json.dumps(drawn))
    return path


SIDES = {"A": (2, 32), "B": (32, 2)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_tracks_two_videos_and_a_run_that_repeats(tiny_model, image, tracks, tmp_path):
    common = ["--model", str(tiny_model), "--image", str(image), "--prompt", "a red circle: moving, #1 at ${fps}"]
    first = tmp_path / "first"
    code = sample.main(
        [*common, "--trajectories", str(tracks), "--control", "object", "--num-videos", "2", "--output", str(first)]
    )
    assert code == 0
    expected = [f"{kind}-{seed}.mp4" for kind in ("overlay", "video") for seed in (0, 1)]
    assert names(first) == sorted([*expected, "first_frame.png", "run.yaml", "trajectories.json"])
    frames = iio.imread(first / "video-1.mp4")
    assert frames.shape == (4, 256, 256, 3)
    assert not np.array_equal(frames, iio.imread(first / "overlay-1.mp4"))

    second = tmp_path / "second"
    torch.manual_seed(99)
    assert sample.main(["--config", str(first / "run.yaml"), "--output", str(second)]) == 0
    for name in expected:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert load_job(second / "run.yaml").prompt == "a red circle: moving, #1 at ${fps}"


def test_a_bare_list_is_in_pixels_of_the_video(tiny_model, image, tmp_path):
    (tmp_path / "bare.json").write_text(json.dumps([[[4, 8], [20, 8]], [[30, 31]]]))
    job = SampleJob(model=str(tiny_model), image=str(image), trajectories=str(tmp_path / "bare.json"))
    points = prepare(job).trajectories.points
    assert points[0, [0, -1]].tolist() == [[4, 8], [20, 8]]
    assert points[1, 0].tolist() == [30, 31]


def test_a_spline_is_in_pixels_of_the_picture_or_of_the_size_given(tiny_model, image, tmp_path, caplog):
    path = tmp_path / "spline.json"
    path.write_text("[{'x': 30, 'y': 20}, {'x': 40, 'y': 20}]")
    job = SampleJob(model=str(tiny_model), image=str(image), trajectories=str(path))
    # 60x40 covers 32x32 at 0.8, and 8 columns are cut off at each side.
    ends = prepare(job).trajectories.points[0, [0, -1]].tolist()
    assert np.allclose(ends, [[30.5 * 0.8 - 8.5, 15.9], [40.5 * 0.8 - 8.5, 15.9]])
    assert "spline.json (kjnodes) states no frame size; 60x40 was assumed" in caplog.text
    caplog.clear()
    ends = prepare(replace(job, trajectories_size="120x80")).trajectories.points[0, [0, -1]].tolist()
    assert np.allclose(ends, [[30.5 * 0.4 - 8.5, 20.5 * 0.4 - 0.5], [40.5 * 0.4 - 8.5, 20.5 * 0.4 - 0.5]])
    assert "no frame size" not in caplog.text


def test_a_run_with_another_tools_tracks_repeats(tiny_model, image, tmp_path):
    from imageconductor.sampling.job import prepare
    from imageconductor.sampling.job_files import write

    folder = tmp_path / "tora"
    folder.mkdir()
    for n in (1, 2):
        (folder / f"{n}.txt").write_text("".join(f"{100 + 3 * i},{90 * n}\n" for i in range(20)))
    job = SampleJob(model=str(tiny_model), image=str(image), trajectories=str(folder), trajectories_size="720x480")
    inputs = prepare(job)
    write(inputs, [np.zeros((4, 32, 32, 3), np.uint8)], tmp_path)
    saved = load_job(tmp_path / "run.yaml")
    assert (saved.trajectories, saved.trajectories_size) == (str(tmp_path / "trajectories.json"), None)
    again = prepare(saved).trajectories
    assert again.num_tracks == 2
    assert torch.equal(again.points, inputs.trajectories.points)
    assert torch.equal(again.visible, inputs.trajectories.visible)


def test_camera_preset_with_two_seeds(tiny_model, image, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model", str(tiny_model), "--image", str(image), "--control", "camera", "--preset", "pan-left"]
    assert sample.main([*arguments, "--seed", "1", "2", "--steps", "1", "--output", str(out)]) == 0
    assert {"video-1.mp4", "video-2.mp4", "overlay-1.mp4", "overlay-2.mp4"} <= set(names(out))
    one = tmp_path / "one"
    assert sample.main([*arguments, "--seed", "2", "--steps", "1", "--output", str(one)]) == 0
    alone, first, second = (
        iio.imread(path).astype(int) for path in (one / "video-2.mp4", out / "video-1.mp4", out / "video-2.mp4")
    )
    # The codec is lossy, and a batch of two rounds otherwise than one: compare means.
    between_seeds = np.abs(first - second).mean()
    assert between_seeds > 5
    assert np.abs(alone - second).mean() < 0.1 * between_seeds, "a video is that of its seed, whatever else was made"


def test_a_style_lora_changes_the_video_by_its_scale(tiny_model, image, tmp_path):
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(0)
    state = {f"{layer}.lora_{side}.weight": torch.randn(s, generator=generator) for side, s in SIDES.items()}
    save_file(state, tmp_path / "style.safetensors")
    videos = {}
    style = f"{tmp_path}/style.safetensors"
    for name, lora in {"none": [], "off": ["--lora", f"{style}:0"], "on": ["--lora", f"{style}:0.6"]}.items():
        output = tmp_path / name
        common = ["--model", str(tiny_model), "--image", str(image), "--output", str(output)]
        assert sample.main([*common, *lora]) == 0
        videos[name] = (output / "video-0.mp4").read_bytes()
    assert videos["off"] == videos["none"] != videos["on"]
    assert sample.main(["--config", str(tmp_path / "on" / "run.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "video-0.mp4").read_bytes() == videos["on"]


def test_flags_win_over_yaml_and_mean_the_same(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("preset: pan-left\nsteps: 7\nseed: [3]\n")
    job = sample.build_job(path, {"steps": 9, "preset": None, "trajectories": "t.json"})
    assert job == SampleJob(steps=9, seed=[3], trajectories="t.json")


def test_an_option_replaces_what_the_yaml_says_of_motion(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("trajectories: t.json\n")
    for option in ({"motion_from": "v.mp4"}, {"preset": "arc"}):
        assert sample.build_job(path, option) == SampleJob(**option)
    assert sample.build_job(path, {"steps": 3}) == SampleJob(trajectories="t.json", steps=3)


def test_another_motion_brings_its_own_control(tiny_model, image, tmp_path):
    path = tmp_path / "camera.json"
    path.write_text('{"camera": {"pan": [0.2, 0]}}')
    for option in ({"preset": "pan-left"}, {"trajectories": str(path)}):
        assert prepare(sample.build_job(sample.DEFAULT_CONFIG, option)).job.control == "camera"
    common = {"model": str(tiny_model), "image": str(image), "prompt": "a star", "device": "cpu"}
    record = tmp_path / "run.yaml"
    config_file.save(SampleJob(**common, preset="pan-left", control="camera", strength=2.0, steps=7), record)
    job = prepare(sample.build_job(record, {"preset": "line-right"})).job
    assert (job.control, job.strength, job.steps) == ("object", 1.0, 7)
    assert sample.build_job(record, {"preset": "line-right", "control": "base"}).control == "base"
    assert sample.build_job(record, {"boxes": "b.json"}).first_frame_by is None
    config_file.save(SampleJob(**common, trajectories=str(path), camera_free_scale=1.5, control="object"), record)
    assert prepare(sample.build_job(record, {"preset": "pan-left"})).job.camera_free_scale is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"start": (1.0, 1.0)}, r"start \(1.0, 1.0\) goes with an object preset"),
        ({"start": (1.0, 1.0), "preset": "pan-left"}, "goes with an object preset"),
        ({"strength": 2.0, "trajectories": "t.json"}, "strength 2.0 goes with preset"),
    ],
)
def test_what_presets_alone_take_is_refused_beside_anything_else(given, said):
    with pytest.raises(ValueError, match=said):
        SampleJob(**given)


def test_a_track_that_the_crop_leaves_out_is_told(tiny_model, tmp_path, caplog):
    Image.new("RGB", (256, 64)).save(tmp_path / "wide.png")
    lost, kept = {"points": [[8, 30], [40, 30]]}, {"points": [[120, 30], [140, 30]]}
    path = tmp_path / "drawn.json"
    job = SampleJob(image=str(tmp_path / "wide.png"), model=str(tiny_model), trajectories=str(path), device="cpu")
    for tracks, said in (([kept], None), ([kept, lost], "track 1 is outside of the cropped picture in all frames")):
        path.write_text(json.dumps({"width": 256, "height": 64, "tracks": tracks, "camera": {"pan": [0.1, 0]}}))
        caplog.clear()
        prepare(job)
        assert [text.removeprefix(f"{path}: ") for text in caplog.messages if text.startswith(str(path))] == [said] * (
            said is not None
        )
    path.write_text(json.dumps({"width": 256, "height": 64, "tracks": [lost]}))
    with pytest.raises(
        ValueError, match="every track is outside of the cropped picture, which is 32x32 from the middle"
    ):
        prepare(job)


def test_a_prompt_may_begin_with_the_word_that_overlays_begin_with(tiny_model, tmp_path):
    job = SampleJob(prompt="Overlay", preset="line-right", model=str(tiny_model), steps=1, device="cpu")
    inputs = prepare(job)
    write(inputs, render(load_pipeline(inputs.job), [inputs])[0], tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["overlay-0.mp4", "video-overlay-0.mp4"]


def test_the_control_suits_what_a_file_moves(tiny_model, image, tmp_path):
    path = tmp_path / "drawn.json"
    camera, track = {"pan": [0.2, 0]}, {"points": [[8, 8], [20, 8]]}
    contents = {
        "camera": {"camera": camera},
        "mixed": {"width": 32, "height": 32, "tracks": [track], "camera": camera},
        "object": {"width": 32, "height": 32, "tracks": [track]},
    }
    for control, content in contents.items():
        path.write_text(json.dumps(content))
        inputs = prepare(SampleJob(model=str(tiny_model), image=str(image), trajectories=str(path)))
        assert inputs.job.control == control
    asked = SampleJob(model=str(tiny_model), image=str(image), trajectories=str(path), control="base")
    assert prepare(asked).job.control == "base"
    other = shutil.copytree(tiny_model, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    index["sampling_defaults"]["control"] = "camera"
    (other / "model_index.json").write_text(json.dumps(index))
    assert prepare(replace(asked, model=str(other), control=None)).job.control == "camera"
    path.write_text(json.dumps({**contents["object"], "tracks": [track | {"control": "object"}]}))
    assert prepare(replace(asked, model=str(other), control=None)).job.control == "object"


def test_the_command_says_what_it_chose_and_what_it_crops(tiny_model, image, tmp_path, monkeypatch, capsys, caplog):
    for name in ("load_pipeline", "render", "write"):
        monkeypatch.setattr(sample, name, lambda *_: [None])
    (tmp_path / "drawn.json").write_text('{"width": 32, "height": 32, "tracks": [{"points": [[8, 8], [20, 8]]}]}')
    command = ["--image", str(image), "--trajectories", str(tmp_path / "drawn.json"), "--output"]
    Image.new("RGB", (33, 32)).save(image)
    assert sample.main([*command, str(tmp_path / "a"), "--model", str(tiny_model)]) == 0
    said = capsys.readouterr().err
    assert "control: object; --control says another" in said
    assert "sprite world" not in said
    assert not caplog.records
    Image.new("RGB", (36, 90)).save(image)
    assert sample.main([*command, str(tmp_path / "b"), "--model", str(tiny_model), "--control", "camera"]) == 0
    assert "control:" not in capsys.readouterr().err
    assert "60 % of the picture is cropped away, as it has 36x90 pixels and the video 32x32" in caplog.text
    assert sample.main([*command, str(tmp_path / "c")]) == 0
    assert "models/sprites has seen the sprite world alone; for photos give --model" in capsys.readouterr().err


def test_every_preset_suits_its_control(tiny_model, image):
    for preset in (*CAMERA_PRESETS, *OBJECT_PRESETS):
        inputs = prepare(SampleJob(model=str(tiny_model), image=str(image), preset=preset))
        assert inputs.job.control == ("camera" if preset in CAMERA_PRESETS else "object")
        assert inputs.trajectories.num_tracks
        assert inputs.image.size == inputs.trajectories.size == (32, 32)


BAD = {
    "missing image": (["--image", "nowhere.png"], "nowhere.png"),
    "text as image": (["--image", "{text}"], "note.txt"),
    "malformed JSON": (["--trajectories", "{text}"], "note.txt"),
    "point outside": (["--trajectories", "{outside}"], r"track 0, point 1 at (700"),
    "wrong size": (
        ["--trajectories", "{outside}", "--trajectories-size", "wide"],
        "trajectories_size must be WIDTHxHEIGHT in pixels",
    ),
    "size of nothing": (["--preset", "pan-left", "--trajectories-size", "8x8"], "goes with trajectories"),
    "unknown preset": (["--preset", "pan-lef"], "pan-left"),
    "two motions": (["--motion-from", "{text}", "--preset", "pan-left"], "exclude each other"),
    "missing footage": (["--motion-from", "nowhere.mp4"], "nowhere.mp4: no such video file"),
    "text as footage": (["--motion-from", "{text}"], "note.txt cannot be read as a video"),
    "no steps": (["--steps", "0"], "steps must be at least 1"),
    "no LoRA": (["--model", "{bare}", "--preset", "pan-left"], "camera LoRA"),
    "no model": (["--model", "nowhere/at/all"], "nowhere/at/all"),
    "seed twice": (["--seed", "1", "1"], "twice"),
    "camera-free camera": (["--preset", "pan-left", "--camera-free-scale", "1.5"], "camera_free_scale"),
    "odd width": (["--width", "33"], "multiples of 2"),
    "window that is too long": (["--num-frames", "70", "--window-frames", "33"], "window_frames must be from 2 to 32"),
    "absent device": (["--device", "cuda:99"], "cuda:99"),
    "absent repository": (["--model", "organisation/name"], "the hub did not give one: no connection"),
    "offload without a GPU": (["--offload", "model", "--device", "cpu"], "the device is cpu"),
    "absent LoRA file": (["--lora", "nowhere.safetensors:0.5"], "no file at nowhere.safetensors"),
    "LoRA as base": (
        ["--base", "models/sprites/style_lora/pytorch_lora_weights.safetensors"],
        "is a LoRA and no base model",
    ),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "output in use": (["--output", "{used}"], "not empty"),
    "output under a file": (["--output", "{text}/out"], "note.txt is no folder"),
    "output name too long": (["--output", "x" * 300], "File name too long"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, tiny_model, image, tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise OSError("no connection")

    def loaded(*_, **__):
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", loaded)
    arguments, message = BAD[name]
    (tmp_path / "note.txt").write_text("not what it is taken for")
    (tmp_path / "outside.json").write_text(json.dumps([[[1, 1], [700, 1]]]))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model_index.json").write_bytes((tiny_model / "model_index.json").read_bytes())
    paths = {
        "text": tmp_path / "note.txt",
        "outside": tmp_path / "outside.json",
        "bare": bare,
        "used": tmp_path / "used",
    }
    arguments = [argument.format(**paths) for argument in arguments]
    output = tmp_path / "out"
    common = ["--model", str(tiny_model), "--image", str(image), "--output", str(output)]
    before = set(tmp_path.iterdir())
    assert sample.main([*common, *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert set(tmp_path.iterdir()) == before


def test_an_output_that_appears_meanwhile_costs_no_video(tiny_model, image, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"

    def render(*_):
        output.mkdir()
        (output / "of another").touch()
        return [[np.zeros((4, 32, 32, 3), np.uint8)]]

    monkeypatch.setattr(sample, "load_pipeline", lambda _: None)
    monkeypatch.setattr(sample, "render", render)
    assert sample.main(["--model", str(tiny_model), "--image", str(image), "--output", str(output)]) == 1
    (kept,) = tmp_path.rglob("video-0.mp4")
    assert f"the new one is in {kept.parent}" in capsys.readouterr().err
    assert names(output) == ["of another"]


def test_a_failure_while_sampling_leaves_nothing(tiny_model, image, tmp_path, monkeypatch):
    from imageconductor.sampling.pipeline import ImageConductorPipeline

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageConductorPipeline, "decode_latents", interrupt)
    output = tmp_path / "deep" / "out"
    assert sample.main(["--model", str(tiny_model), "--image", str(image), "--output", str(output)]) == 130
    assert not list(tmp_path.glob("deep/*"))


def test_a_run_records_the_files_of_its_loras_wherever_they_were_found(tmp_path, monkeypatch):
    from imageconductor.sampling.loras import absolute_lora

    shipped = "models/sprites/style_lora/pytorch_lora_weights.safetensors"
    whole = str(Path(__file__).parents[1] / shipped)
    monkeypatch.chdir(tmp_path)
    assert absolute_lora(shipped) == whole
    assert absolute_lora(f"{shipped}:0.5") == f"{whole}:0.5"
    assert absolute_lora(f"{shipped}:{1 / 3}") == f"{whole}:{1 / 3}"
    assert absolute_lora("mine.safetensors:2") == f"{tmp_path / 'mine.safetensors'}:2"
    (tmp_path / "blob").touch()
    (tmp_path / "cached.safetensors").symlink_to("blob")  # as in the hub's cache; a name without a format is no name
    assert absolute_lora("cached.safetensors") == str(tmp_path / "cached.safetensors")
