"""Evaluations whose outcome is known, of files as any method would hand them in."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from imageconductor import config as config_file
from imageconductor.commands.evaluate import main
from imageconductor.conditioning import Trajectories, camera_preset
from imageconductor.data.sprite_world import SpriteWorldConfig
from imageconductor.evaluation import video_files
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig, Method, Task
from imageconductor.evaluation.drawn_motion.protocol import Evaluation
from imageconductor.evaluation.drawn_motion.report import format_markdown
from imageconductor.evaluation.drawn_motion.requests import build_requests
from imageconductor.evaluation.video_files import is_made, keep_video, write_video
from imageconductor.sampling.job import SampleJob, load_pipeline, prepare, render
from imageconductor.sampling.video import upscale_for_viewing, write_mp4

SIZE, FRAMES = (64, 64), 16
ROOT = Path(__file__).parents[3]


def scene_config(videos: Path, **settings) -> EvaluateConfig:
    return EvaluateConfig(
        **{"videos": str(videos), "motions": "own", "num_scenes": 3, "size": SIZE, "num_frames": FRAMES, **settings}
    )


def evaluate(config: EvaluateConfig, output: Path) -> dict:
    record = Evaluation(config, output).run()
    assert record is not None
    return record


def test_videos_that_follow_exactly_score_below_a_pixel(exact, tmp_path, caplog):
    record = evaluate(scene_config(exact, frechet=["frechet_small"], reference=str(exact)), tmp_path)
    assert record["cam_mc"] < 1
    assert record["obj_mc"] < 1
    assert record["background_displacement_object"] < 0.2
    assert record["tracked_fraction"] > 0.9
    assert record["first_frame_psnr"] > 30
    assert record["first_frame_ssim"] > 0.95
    assert record["cam_mc_still"] > 3
    assert record["methods"]["exact"]["tasks"]["object"]["colour_error"]["mean"] < 1.2
    assert not [record for record in caplog.records if "true clips" in record.getMessage()]
    reach = r"(1\.00|0\.9\d) of the points with an error of 0\.\d\d px"
    said = rf"On the true clips of these requests the tracker follows: camera {reach}; object {reach}\."
    assert re.search(said, format_markdown(record))
    assert record["methods"]["exact"]["frechet"]["frechet_small"]["value"] == pytest.approx(0, abs=1e-6)
    camera = record["methods"]["exact"]["tasks"]["camera"]
    diagonals = np.hypot(384, 256) / np.hypot(64, 64)
    assert camera["error_384x256"]["mean"] == pytest.approx(camera["error"]["mean"] * diagonals)
    percent = camera["error_percent_of_diagonal"]["mean"]
    assert percent == pytest.approx(100 * camera["error"]["mean"] / np.hypot(64, 64))


def test_where_true_clips_cannot_be_followed_it_is_said_before_videos_are_made(
    tiny_model, tmp_path, monkeypatch, caplog
):
    plain = SpriteWorldConfig(min_sprites=1, max_sprites=1, sprite_radius=(0.2, 0.28), patterns=())
    config = EvaluateConfig(model=str(tiny_model), motions="own", num_scenes=3, world=plain, size=SIZE, device="cpu")
    monkeypatch.setattr(Evaluation, "_generate", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Evaluation(config, tmp_path).run()
    (said,) = [record.getMessage() for record in caplog.records if "true clips" in record.getMessage()]
    assert re.match(r"the tracker follows only 0\.\d\d of the object points on the true clips", said)


def test_motionless_videos_score_what_still_says(tmp_path, write_videos):
    videos = tmp_path / "still"
    config = scene_config(videos, num_scenes=2)
    write_videos(videos, config, lambda request: np.repeat(request.truth[:1], FRAMES, axis=0))
    record = evaluate(config, tmp_path / "out")
    assert record["cam_mc_all_points"] == pytest.approx(record["cam_mc_still"], abs=0.05)
    assert record["obj_mc_all_points"] == pytest.approx(record["obj_mc_still"], abs=0.05)
    assert record["background_displacement_object"] == pytest.approx(0, abs=0.05)


def test_a_copy_shifted_after_the_first_frame_scores_its_shift(tmp_path, write_videos):
    def shift(request):
        padded = np.pad(request.truth, ((0, 0), (4, 0), (3, 0), (0, 0)), mode="edge")
        return np.concatenate([request.truth[:1], padded[1:, : SIZE[1], : SIZE[0]]])

    videos = tmp_path / "shifted"
    config = scene_config(videos)
    write_videos(videos, config, shift)
    record = evaluate(config, tmp_path / "out")
    assert record["cam_mc"] == pytest.approx(5, abs=0.3)
    assert record["background_displacement_object"] == pytest.approx(5, abs=0.3)
    tasks = record["methods"]["shifted"]["tasks"]
    assert tasks["object"]["colour_error"]["mean"] == pytest.approx(5, abs=1.2)
    assert "colour_error" not in tasks["camera"]


def test_missing_mixed_up_and_cut_videos_are_errors(exact, tmp_path, capsys):
    videos = tmp_path / "theirs"
    shutil.copytree(exact, videos)
    keys = sorted(path.name for path in (videos / "object").iterdir())
    first, second = videos / "object" / keys[0], videos / "object" / keys[1]
    command = ["motions=own", f"videos={videos}", "num_scenes=3", "size=[64,64]", "--output", str(tmp_path / "out")]

    first.rename(tmp_path / "aside.mp4")
    assert main(command) == 2
    assert f"lacks 1 of 6 videos, the first one is {first}" in capsys.readouterr().err
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
    assert "is 96x64, whose aspect ratio is not that of 64x64" in capsys.readouterr().err
    first.write_bytes(b"not a video")
    assert main(command) == 2
    assert f"{first} cannot be read as a video" in capsys.readouterr().err


def tiny_config(model: Path, **settings) -> EvaluateConfig:
    return EvaluateConfig(
        **{
            "model": str(model),
            "num_scenes": 2,
            "camera_presets": ["pan-left", "zoom-in"],
            "object_presets": ["arc"],
            "num_inference_steps": 1,
            "batch_size": 2,
            "device": "cpu",
            **settings,
        }
    )


def test_a_task_without_an_image_has_prompt_and_trajectories_alone(tiny_model, tmp_path):
    tasks = {"shown": Task("object", "object"), "told": Task("object", "object", image=False)}
    evaluation = Evaluation(tiny_config(tiny_model, num_scenes=1, tasks=tasks), tmp_path / "results")
    scores = evaluation.run()["methods"]["tiny"]["tasks"]
    assert "first_frame_psnr" in scores["shown"]
    assert "first_frame_psnr" not in scores["told"], "it was not shown"
    (request,) = evaluation.requests["object"]
    asked = {"prompt": request.prompt, "control": "object", "seed": [0], "steps": 1, "device": "cpu"}
    request.trajectories.save(tmp_path / "tracks.json")
    job = SampleJob(model=str(tiny_model), trajectories=str(tmp_path / "tracks.json"), **asked)
    inputs = prepare(job)
    ((video,),) = render(load_pipeline(inputs.job), [inputs])
    folder = tmp_path / "results" / "videos" / "tiny"
    write_video(tmp_path / "alone.mp4", upscale_for_viewing(video)[0])
    assert (folder / "told" / f"{request.key}.mp4").read_bytes() == (tmp_path / "alone.mp4").read_bytes()
    assert (folder / "shown" / f"{request.key}.mp4").read_bytes() != (tmp_path / "alone.mp4").read_bytes()
    record = json.loads((folder / "made_with.json").read_text())
    assert record["task told"]["image"] is False
    assert "image" not in record["task shown"], "folders of earlier versions, which lack it, go on"


def test_videos_of_a_task_without_an_image_may_begin_as_they_like(write_videos, tmp_path):
    def swap(request):
        return requests[1 if request.key == requests[0].key else 0].truth

    told, shown = (
        scene_config(tmp_path / "mine", tasks={"object": Task("object", "object", image=shows)}, device="cpu")
        for shows in (False, True)
    )
    requests = build_requests(told, "object", SIZE, FRAMES)
    write_videos(tmp_path / "mine", told, swap)
    record = evaluate(told, tmp_path / "results")
    assert "first_frame_psnr" not in record
    assert "first frame" not in format_markdown(record)
    with pytest.raises(ValueError, match="are the names mixed up"):
        evaluate(shown, tmp_path / "other")


@pytest.mark.slow
def test_a_faster_method_is_compared_with_the_videos_of_its_original(write_videos, tmp_path):
    def darken(by):
        return lambda request: np.clip(request.truth.astype(int), by, 255).astype(np.uint8) - by

    methods = {"whole": Method(videos=str(tmp_path / "whole"))}
    for name in ("same", "dark"):
        methods[name] = Method(videos=str(tmp_path / name), original="whole")
    config = replace(scene_config(tmp_path, num_scenes=2, device="cpu"), videos=None, methods=methods)
    for name, by in (("whole", 0), ("same", 0), ("dark", 8)):
        write_videos(tmp_path / name, config, darken(by))
    record = evaluate(config, tmp_path / "out")
    tasks = {name: found["tasks"]["object"] for name, found in record["methods"].items()}
    assert "original_psnr" not in tasks["whole"]
    assert tasks["same"]["original_psnr"]["mean"] == 100
    assert tasks["dark"]["original_psnr"]["mean"] == pytest.approx(20 * np.log10(255 / 8), abs=1)
    assert "PSNR to the original's videos, dB" in format_markdown(record)
    write_videos(tmp_path / "whole", replace(config, tasks={"object": config.tasks["object"]}), darken(8))
    again = evaluate(config, tmp_path / "out")["methods"]["dark"]["tasks"]
    assert again["object"]["original_psnr"]["mean"] == 100, "compared anew"
    assert again["camera"]["original_psnr"]["mean"] < 40
    other = replace(config, methods={**methods, "small": Method(videos=".", original="whole", size=(32, 32))})
    with pytest.raises(ValueError, match="method small: its original whole has videos of another format: 32x32x"):
        evaluate(other, tmp_path / "other")


def test_a_video_of_a_request_that_was_another_then_is_made_anew(tmp_path):
    path = tmp_path / "a.mp4"
    assert not is_made(path, "now")
    path.touch()
    for settings, expected in (
        (None, True),
        ({"seed": 1}, True),
        ({"request": "now"}, True),
        ({"request": "x"}, False),
    ):
        if settings is not None:
            path.with_suffix(".json").write_text(json.dumps(settings))
        assert is_made(path, "now") is expected


def test_a_video_that_could_not_be_written_leaves_no_former_one_beside_its_facts(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"of the former request")
    path.with_suffix(".json").write_text(json.dumps({"request": "former"}))
    with pytest.raises((ValueError, TypeError, AttributeError, IndexError)):
        keep_video(path, cast(Any, None), {"request": "now"})
    assert not is_made(path, "now")


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_the_same(tiny_model, tmp_path, monkeypatch):
    undisturbed = evaluate(tiny_config(tiny_model), tmp_path / "whole")
    write_video, written = video_files.write_video, []

    def write_or_die(path, frames):
        if len(written) == 4:  # after two batches of three
            raise KeyboardInterrupt
        written.append(path.name)
        write_video(path, frames)

    monkeypatch.setattr(video_files, "write_video", write_or_die)
    with pytest.raises(KeyboardInterrupt):
        Evaluation(tiny_config(tiny_model), tmp_path / "cut").run()
    written.clear()
    resumed = evaluate(tiny_config(tiny_model), tmp_path / "cut")
    assert len(written) == 2, "four of six videos were there"
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.mp4")]
    assert len(names) == 6
    assert all((tmp_path / "cut" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)
    for record in (undisturbed, resumed):
        for task in record["methods"]["tiny"]["tasks"].values():
            assert task.pop("seconds")["mean"] > 0
    assert resumed["methods"] == undisturbed["methods"]

    requested = Trajectories.load(
        tmp_path / "cut" / "requests" / "tiny" / "camera" / "scene-1_zoom-in.json", num_frames=4
    )
    assert torch.equal(requested.points, camera_preset("zoom-in", (32, 32), 4).points)

    with pytest.raises(ValueError, match="made with other settings: num_inference_steps was 1 and now 3"):
        Evaluation(tiny_config(tiny_model, num_inference_steps=3), tmp_path / "cut").run()
    with pytest.raises(ValueError, match=r"made with other settings: task object.control was object and now base"):
        Evaluation(tiny_config(tiny_model, tasks={"object": Task("object", "base")}), tmp_path / "cut").run()
    more = {"again": Method(videos=str(tmp_path / "cut" / "videos" / "tiny"))}
    both = evaluate(tiny_config(tiny_model, methods=more), tmp_path / "cut")["methods"]
    assert not written[2:], "a further method makes no video again"
    for name, summary in both["again"]["tasks"].items():
        expected = both["tiny"]["tasks"][name].items()
        assert summary == {key: value for key, value in expected if key != "seconds"}

    record = tmp_path / "cut" / "videos" / "tiny" / "made_with.json"
    older = {key: value for key, value in json.loads(record.read_text()).items() if key != "sampling_defaults"}
    record.write_text(json.dumps(older))
    with pytest.raises(ValueError, match="made with other settings: sampling_defaults"):
        Evaluation(tiny_config(tiny_model), tmp_path / "cut").run()


@pytest.fixture
def one_thread():
    """The number of threads changes the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tiny_model, tmp_path, one_thread):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {tiny_model}\nnum_scenes: 3\ncamera_presets: [pan-left]\nobject_presets: [arc]\n"
        "num_inference_steps: 1\nbatch_size: 1\ndevice: cpu\nfrechet: [frechet_small]\nnum_reference: 4\n"
    )
    arguments = ["--config", str(config), "--output"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "scripts/evaluate.py", *arguments, str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert (one["settings"]["num_processes"], two["settings"]["num_processes"]) == (1, 2)
    for record in (one, two):
        for task in record["methods"]["tiny"]["tasks"].values():
            del task["seconds"]
    assert one["methods"] == two["methods"]
    page = (tmp_path / "one" / "report.html").read_text()
    assert "tiny: Fréchet distance of the embedded extractor " in page
    assert ", 6 samples against 4 of sprite world." in (tmp_path / "one" / "table.md").read_text()
    for source in ("report/tiny/camera/scene-0_pan-left.mp4", "report/tiny/object/scene-2_arc.mp4"):
        assert source in page
        assert (tmp_path / "one" / source).is_file()
    assert "background displacement" in page
    assert "tracked fraction" in page
    assert (tmp_path / "one" / "same_camera.png").is_file()


def test_the_command_refuses_before_it_works(tiny_model, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for arguments, message in (
        (["model=nowhere", *output], "no model folder at nowhere"),
        ([f"model={tiny_model}", "--output", str(tmp_path / "full")], "holds something else"),
        ([f"model={tiny_model}", f"clip={tmp_path}", *output], "no CLIP model"),
        ([f"model={tiny_model}", "images=nowhere", *output], "no folder of images at nowhere"),
        ([f"model={tiny_model}", "num_scenes=1", "device=cuda:99", *output], "device 'cuda:99' cannot be used"),
        (
            [f"model={tiny_model}", "frechet=[fid]", "fid_weights=nowhere", *output],
            "fid_weights: no Inception weights at nowhere",
        ),
        ([f"model={tiny_model}", "frechet=[frechet_small]", f"reference={tmp_path}", *output], "no mp4 file in"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


DRAWN_MOTION = sorted(
    path
    for path in (ROOT / "configs" / "evaluate").glob("*.yaml")
    if not path.name.startswith(("motion_director", "smcd"))
)


@pytest.mark.parametrize("path", DRAWN_MOTION, ids=lambda path: path.stem)
def test_the_configs_load(path, tmp_path, monkeypatch):
    config = config_file.load(EvaluateConfig, path)
    assert config.all_methods
    assert all(method.model for method in config.all_methods.values())
    if "sprites" in path.stem:  # The models that they name are here.
        monkeypatch.chdir(ROOT)
        assert all(Evaluation(replace(config, num_scenes=1, device="cpu"), tmp_path).requests.values())


def test_a_shape_that_the_model_cannot_make_is_refused_before_anything_is_written(tiny_model, tmp_path):
    config = EvaluateConfig(model=str(tiny_model), num_scenes=1, device="cpu", size=(33, 32))
    with pytest.raises(ValueError, match="width and height must be multiples of 2, got 33 x 32"):
        Evaluation(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configs_that_cannot_be():
    for settings, match in (
        ({}, "nothing to evaluate"),
        ({"model": "a/x", "videos": "b/x"}, "two methods have the same name"),
        ({"model": "m", "frechet": ["fid"]}, "fid needs fid_weights=FILE"),
        (
            {"methods": {"a": Method("m"), "b": Method("m", original="c")}},
            "method b: original 'c' is no other method; there are: a",
        ),
        ({"methods": {"a": Method("m", original="a")}}, "method a: original 'a' is no other method; there are: none"),
        ({"model": "m", "camera_presets": ["dolly"]}, "there is no dolly"),
        ({"model": "m", "tasks": {"a/b": Task()}}, "'a/b' cannot be one"),
        ({"model": "m", "tasks": {"a": Task(control="camera", camera_free_scale=1.5)}}, "needs control object"),
        ({"model": "m", "images": "i", "motions": "own"}, "leave images out"),
        ({"model": "m", "images": "i", "frechet": ["frechet_small"]}, "reference=FOLDER"),
    ):
        with pytest.raises(ValueError, match=match):
            EvaluateConfig(**settings)
    with pytest.raises(ValueError, match="a model or videos, and not both"):
        Method()
    for old, new in EvaluateConfig.RENAMED.items():
        with pytest.raises(ValueError, match=f"unknown key '{old}'; it is called '{new}' now"):
            config_file.load(EvaluateConfig, None, [f"{old}={{}}"])
