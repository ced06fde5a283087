"""Evaluations whose outcome is known, through files as any method's videos would come."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imageconductor import config as config_file
from imageconductor.conditioning import Trajectories, camera_preset
from imageconductor.data.trackers import LucasKanadeTracker
from imageconductor.evaluation.evaluate_config import Arm, EvaluateConfig, Row
from imageconductor.evaluation.protocol import Evaluation
from imageconductor.evaluation.report import latex, markdown
from imageconductor.evaluation.requests import build_requests
from imageconductor.evaluation.scores import measure
from imageconductor.evaluation.video_files import read_video
from imageconductor.sampling.video import upscale_for_viewing, write_mp4
from scripts.evaluate import main

SIZE, FRAMES = (64, 64), 16
ROOT = Path(__file__).parents[2]


def made_elsewhere(folder: Path, config: EvaluateConfig, change=lambda request: request.truth) -> Path:
    """What another method would hand in: ARM/KEY.mp4."""
    for arm, asked in config.arms.items():
        for request in build_requests(config, asked.requests, SIZE, FRAMES):
            path = folder / arm / f"{request.key}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mp4(path, upscale_for_viewing(change(request))[0], 8)
    return folder


def scenes(videos: Path, **settings) -> EvaluateConfig:
    return EvaluateConfig(
        **{"videos": str(videos), "motions": "own", "num_scenes": 3, "size": SIZE, "num_frames": FRAMES, **settings}
    )


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods") / "exact"
    return made_elsewhere(folder, scenes(folder, num_scenes=8))


def figures_of(config: EvaluateConfig, output: Path) -> dict:
    record = Evaluation(config, output).run()
    assert record is not None
    return record


def test_videos_that_follow_exactly_score_below_a_pixel(exact, tmp_path):
    config = scenes(exact, num_scenes=8, frechet=["frechet_small"], reference=str(exact))
    record = figures_of(config, tmp_path)
    assert record["cam_mc"] < 1
    assert record["obj_mc"] < 1
    assert record["leak_object"] < 0.2
    assert record["coverage"] > 0.9
    assert record["first_frame_psnr"] > 30
    assert record["first_frame_ssim"] > 0.95
    assert record["cam_mc_still"] > 3
    assert record["rows"]["exact"]["frechet"]["frechet_small"]["value"] == pytest.approx(0, abs=1e-6)
    arm = record["rows"]["exact"]["arms"]["camera"]
    assert arm["error_384x256"]["mean"] == pytest.approx(arm["error"]["mean"] * np.hypot(384, 256) / np.hypot(64, 64))
    assert arm["error_of_diagonal"]["mean"] == pytest.approx(arm["error"]["mean"] / np.hypot(64, 64))


def test_motionless_videos_score_what_still_says(tmp_path):
    videos = tmp_path / "still"
    made_elsewhere(videos, scenes(videos), lambda request: np.repeat(request.truth[:1], FRAMES, axis=0))
    record = figures_of(scenes(videos), tmp_path / "out")
    assert record["cam_mc_all_points"] == pytest.approx(record["cam_mc_still"], abs=0.05)
    assert record["obj_mc_all_points"] == pytest.approx(record["obj_mc_still"], abs=0.05)
    assert record["leak_object"] == pytest.approx(0, abs=0.05)


def test_a_copy_shifted_after_the_first_frame_scores_its_shift(tmp_path):
    def shifted(request):
        padded = np.pad(request.truth, ((0, 0), (4, 0), (3, 0), (0, 0)), mode="edge")
        return np.concatenate([request.truth[:1], padded[1:, : SIZE[1], : SIZE[0]]])

    videos = tmp_path / "shifted"
    record = figures_of(scenes(made_elsewhere(videos, scenes(videos), shifted)), tmp_path / "out")
    assert record["cam_mc"] == pytest.approx(5, abs=0.3)
    assert record["leak_object"] == pytest.approx(5, abs=0.3)


def test_missing_mixed_up_and_cut_videos_are_errors(exact, tmp_path, capsys):
    videos = tmp_path / "theirs"
    shutil.copytree(exact, videos)
    keys = sorted(path.name for path in (videos / "object").iterdir())
    first, second = videos / "object" / keys[0], videos / "object" / keys[1]
    command = ["motions=own", f"videos={videos}", "num_scenes=8", "size=[64,64]", "--output", str(tmp_path / "out")]

    first.rename(tmp_path / "aside.mp4")
    assert main(command) == 2
    assert f"lacks 1 of 16 videos, the first one is {first}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    second.rename(first)
    (tmp_path / "aside.mp4").rename(second)
    assert main(command) == 2
    assert "begins with the picture of" in capsys.readouterr().err

    write_mp4(first, np.zeros((15, 64, 64, 3), np.uint8), 8)
    assert main(command) == 2
    assert "has 15 frames, 16 were asked for" in capsys.readouterr().err
    write_mp4(first, np.zeros((16, 64, 96, 3), np.uint8), 8)
    assert main(command) == 2
    assert "is 96x64, which is not the shape of 64x64" in capsys.readouterr().err
    first.write_bytes(b"not a video")
    assert main(command) == 2
    assert f"{first} cannot be read as a video" in capsys.readouterr().err


def test_a_larger_video_is_brought_to_the_size_asked_for(tmp_path):
    request = build_requests(scenes(tmp_path), "camera", SIZE, FRAMES)[0]
    assert request.truth is not None
    write_mp4(tmp_path / "large.mp4", upscale_for_viewing(request.truth)[0], 8)
    back = read_video(tmp_path / "large.mp4", SIZE, FRAMES)
    assert np.abs(back.astype(float) - request.truth).mean() < 3


def test_requests_are_held_out_and_repeat(tmp_path):
    first, second = (build_requests(scenes(tmp_path), "object", SIZE, FRAMES) for _ in range(2))
    assert [r.key for r in first] == [r.key for r in second]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))
    assert "moves" not in first[0].prompt
    more = build_requests(replace(scenes(tmp_path), num_scenes=5), "object", SIZE, FRAMES)
    assert [(r.key, r.seed) for r in more[:3]] == [(r.key, r.seed) for r in first]


def test_presets_on_sprite_scenes_keep_the_background_off_the_dragged_path():
    config = EvaluateConfig(model="m", num_scenes=2)
    camera = build_requests(config, "camera", SIZE, FRAMES)
    assert len(camera) == len({request.key for request in camera}) == 20
    dragged = build_requests(config, "object", SIZE, FRAMES)
    assert len(dragged) == 20
    for request in dragged:
        path = request.trajectories.points.numpy().reshape(-1, 2)
        distance = np.linalg.norm(request.background[:, None] - path, axis=-1).min()
        assert distance > 8
        assert len(request.background) > 10


def test_images_with_captions_and_objects(tmp_path):
    Image.new("RGB", (128, 64), "red").save(tmp_path / "a.png")
    config = EvaluateConfig(model="m", images=str(tmp_path), object_presets=["line-right", "shake"])
    with pytest.raises(FileNotFoundError, match="each image needs its JSON"):
        build_requests(config, "camera", SIZE, FRAMES)
    described = tmp_path / "a.json"
    described.write_text('{"caption": "red", "objects": [[64, 32], [80, 20]]}')
    requests = build_requests(config, "object", SIZE, FRAMES)
    assert [r.key for r in requests] == ["a_line-right", "a_shake"]
    # The middle half of the picture is left: x loses 32.
    np.testing.assert_allclose(requests[0].trajectories.points[:, 0], [[32, 32], [48, 20]], atol=0.01)
    assert requests[0].prompt == "red"
    assert len(build_requests(config, "camera", SIZE, FRAMES)) == 10
    for text, match in (
        ('{"caption": "red", "objects": [[10, 32]]}', "outside the 64x64 crop"),
        ('{"caption": "red", "objects": [[64, 99]]}', "outside the 128x64 image"),
        ('{"objects": []}', "expected"),
        ('{"caption": "red"}', "names an object"),
    ):
        described.write_text(text)
        with pytest.raises(ValueError, match=match):
            build_requests(config, "object", SIZE, FRAMES)


def tiny(model: Path, **settings) -> EvaluateConfig:
    return EvaluateConfig(
        **{
            "model": str(model),
            "num_scenes": 2,
            "camera_presets": ["pan-left", "zoom-in"],
            "object_presets": ["arc"],
            "num_inference_steps": 2,
            "batch_size": 2,
            "device": "cpu",
            **settings,
        }
    )


def test_a_killed_evaluation_goes_on_and_ends_the_same(tiny_model, tmp_path, monkeypatch):
    undisturbed = figures_of(tiny(tiny_model), tmp_path / "whole")
    sample, made = Evaluation._sample, []

    def killed(self, pipe, arm, batch):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append([request.key for request in batch])
        return sample(self, pipe, arm, batch)

    monkeypatch.setattr(Evaluation, "_sample", killed)
    with pytest.raises(KeyboardInterrupt):
        Evaluation(tiny(tiny_model), tmp_path / "cut").run()
    made.clear()
    resumed = figures_of(tiny(tiny_model), tmp_path / "cut")
    assert len(made) == 1, "two of three batches were there"
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.mp4")]
    assert len(names) == 6
    assert all((tmp_path / "cut" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)
    for record in (undisturbed, resumed):
        for arm in record["rows"]["tiny"]["arms"].values():
            assert arm.pop("seconds")["mean"] > 0
    assert resumed["rows"] == undisturbed["rows"]

    asked = Trajectories.load(tmp_path / "cut" / "requests" / "camera" / "scene-1_zoom-in.json", num_frames=4)
    assert torch.equal(asked.points, camera_preset("zoom-in", (32, 32), 4).points)

    with pytest.raises(ValueError, match=r"made with other settings \(num_inference_steps\)"):
        Evaluation(tiny(tiny_model, num_inference_steps=3), tmp_path / "cut").run()
    with pytest.raises(ValueError, match=r"made with other settings \(arm object\)"):
        Evaluation(tiny(tiny_model, arms={"object": Arm("object", "base")}), tmp_path / "cut").run()
    more = {"again": Row(videos=str(tmp_path / "cut" / "videos" / "tiny"))}
    both = figures_of(tiny(tiny_model, rows=more), tmp_path / "cut")["rows"]
    assert not made[1:], "a further row makes no video again"
    for arm, found in both["again"]["arms"].items():
        assert found == {key: value for key, value in both["tiny"]["arms"][arm].items() if key != "seconds"}

    record = tmp_path / "cut" / "videos" / "tiny" / "made_with.json"
    older = {key: value for key, value in json.loads(record.read_text()).items() if key != "sampling_defaults"}
    record.write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"made with other settings \(sampling_defaults\)"):
        Evaluation(tiny(tiny_model), tmp_path / "cut").run()


def test_two_processes_measure_what_one_does(tiny_model, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {tiny_model}\nnum_scenes: 3\ncamera_presets: [pan-left]\nobject_presets: [arc]\n"
        "num_inference_steps: 2\nbatch_size: 1\ndevice: cpu\nfrechet: [frechet_small]\nnum_reference: 4\n"
    )
    command = ["scripts/evaluate.py", "--config", str(config), "--output"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # The number of threads changes the last digits.
    for name, arguments in (("one", command), ("two", [*launch, *command])):
        whole = [sys.executable, *arguments, str(tmp_path / name)]
        done = subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert (one["settings"]["num_processes"], two["settings"]["num_processes"]) == (1, 2)
    for record in (one, two):
        for arm in record["rows"]["tiny"]["arms"].values():
            del arm["seconds"]
    assert one["rows"] == two["rows"]
    page = (tmp_path / "one" / "report.html").read_text()
    assert "tiny: Fréchet distance of the embedded extractor " in page
    assert ", 6 samples against 4 of sprite world." in (tmp_path / "one" / "table.md").read_text()
    for source in ("report/tiny/camera/scene-0_pan-left.mp4", "report/tiny/object/scene-2_arc.mp4"):
        assert source in page
        assert (tmp_path / "one" / source).is_file()
    assert (tmp_path / "one" / "same_camera.png").is_file()


def test_tables_have_the_papers_rows_beside_ours(exact, tmp_path):
    record = figures_of(scenes(exact), tmp_path / "out")
    table = markdown(record)
    assert "| DragNUWA, as the paper has it | 237.26 | 1283.85 | 48.72 | 51.24 |" in table
    assert f"| exact | – | – | {record['rows']['exact']['arms']['camera']['error_384x256']['mean']:.2f} (" in table
    record["rows"]["a_b & 50%"] = record["rows"].pop("exact")
    text = latex(record)
    assert r"a\_b \& 50\% & -- & --" in text
    assert text.count(r"\\") == 5
    assert text.startswith("\\begin{tabular}{lrrrrr}")


def test_the_command_refuses_before_it_works(tiny_model, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for arguments, message in (
        (["model=nowhere", *output], "no model folder at nowhere"),
        ([f"model={tiny_model}", "--output", str(tmp_path / "full")], "holds something else"),
        ([f"model={tiny_model}", f"clip={tmp_path}", *output], "no CLIP model"),
        ([f"model={tiny_model}", "images=nowhere", *output], "no folder of images at nowhere"),
        ([f"model={tiny_model}", "frechet=[fid]", "fid_weights=nowhere", *output], "fid_weights: no file at nowhere"),
        ([f"model={tiny_model}", "frechet=[frechet_small]", f"reference={tmp_path}", *output], "no mp4 file in"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "evaluate").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_load(path, tmp_path, monkeypatch):
    config = config_file.load(EvaluateConfig, path)
    assert config.table
    assert all(row.model for row in config.table.values())
    if "sprites" in path.stem:  # What they name is here.
        monkeypatch.chdir(ROOT)
        assert all(Evaluation(replace(config, num_scenes=1, device="cpu"), tmp_path).requests.values())


def test_a_shape_that_the_model_cannot_make_is_refused_before_anything_is_written(tiny_model, tmp_path):
    config = EvaluateConfig(model=str(tiny_model), num_scenes=1, device="cpu", num_frames=33)
    with pytest.raises(ValueError, match=r"num_frames must be 1\.\.32"):
        Evaluation(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configs_that_cannot_be():
    for settings, match in (
        ({}, "nothing to evaluate"),
        ({"model": "a/x", "videos": "b/x"}, "two rows have the same name"),
        ({"model": "m", "frechet": ["fid"]}, "fid needs fid_weights=FILE"),
        ({"model": "m", "camera_presets": ["dolly"]}, "there is no dolly"),
        ({"model": "m", "arms": {"a/b": Arm()}}, "'a/b' is none"),
        ({"model": "m", "arms": {"a": Arm(control="camera", camera_free_scale=1.5)}}, "goes with control object"),
        ({"model": "m", "images": "i", "motions": "own"}, "leave images out"),
        ({"model": "m", "images": "i", "frechet": ["frechet_small"]}, "reference=FOLDER"),
    ):
        with pytest.raises(ValueError, match=match):
            EvaluateConfig(**settings)
    with pytest.raises(ValueError, match="a model or videos, and not both"):
        Row()


def test_a_video_of_another_length_is_an_error(tmp_path):
    request = build_requests(scenes(tmp_path), "camera", SIZE, FRAMES)[0]
    assert request.truth is not None
    with pytest.raises(ValueError, match="expected a video of shape"):
        measure(request, request.truth[:-1], LucasKanadeTracker())


def test_tracker_follows_a_shift_and_loses_what_vanishes():
    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    frames = np.stack([canvas[20:84, 20 + t : 84 + t] for t in range(6)])
    tracks, followed = LucasKanadeTracker().track(frames, np.array([[40.0, 30.0], [2.0, 30.0]]))
    np.testing.assert_allclose(tracks[0], [[40 - t, 30] for t in range(6)], atol=0.15)
    assert followed[0].all()
    assert not followed[1, -1], "it left the frame"
