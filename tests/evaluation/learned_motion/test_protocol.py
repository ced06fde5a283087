"""Learned motions by several methods in one table, from runs of `train.py` on the tiny model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from imageconductor import config as config_file
from imageconductor.commands import sample, train
from imageconductor.commands.evaluate import choose_protocol, main
from imageconductor.evaluation import video_files
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
from imageconductor.evaluation.learned_motion import protocol as learned_motion
from imageconductor.evaluation.learned_motion.config import (
    LearnedMethod,
    LearnedMotion,
    LearnedMotionConfig,
    VideoRequest,
)
from imageconductor.evaluation.learned_motion.protocol import LearnedMotionEvaluation

ROOT = Path(__file__).parents[3]
CONFIGS = [ROOT / "configs" / "evaluate" / f"motion_director{name}.yaml" for name in ("", "_sprites")]
PROMPTS = ["a red circle", "a Blue square, up close"]
LORA = "pytorch_lora_weights.safetensors"
T = 4


def write_clip(path, dx, num_frames=T):
    """A texture that moves by dx px a frame, to the right for positive numbers."""
    canvas = np.random.default_rng(1).integers(0, 255, (8, 24, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    frames = np.stack([canvas[:, 32 - dx * t : 64 - dx * t] for t in range(num_frames)])
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, frames, plugin="FFMPEG", fps=8, codec="libx264", macro_block_size=2)


@pytest.fixture(scope="module")
def work(tiny_model, save_clip, tmp_path_factory):
    """A model, a run for each of two motions, reference clips, and a CLIP."""
    folder = tmp_path_factory.mktemp("work")
    # Without its LoRAs for trajectories, it loads in a fraction of the time.
    shutil.copytree(tiny_model, folder / "model", ignore=lambda *_: ["camera_lora", "object_lora"])
    write_clip(folder / "clips" / "right" / "a.mp4", 2, num_frames=9)  # two windows of four
    write_clip(folder / "clips" / "left" / "a.mp4", -2)
    write_clip(folder / "still" / "a.mp4", 0)
    run = ["stage=motion_director", f"model={folder}/model", "size=[32,32]", "max_steps=2", "lora_rank=2", "prompt=a"]
    run += ["learning_rate=0.1", f"num_frames={T}", "noise_prior=0.5", "inversion_steps=2"]
    assert train.main([*run, f"data=[{folder}/clips/left/a.mp4]", f"output={folder}/runs/left"]) == 0
    shutil.copytree(folder / "runs" / "left", folder / "runs" / "right")
    lora = folder / "runs" / "right" / "motion_lora" / LORA
    save_file({key: -2 * value for key, value in load_file(lora).items()}, lora)
    (folder / "wide").mkdir()
    wide = {key: torch.zeros([24 if n > 2 else n for n in value.shape]) for key, value in load_file(lora).items()}
    save_file(wide, folder / "wide" / LORA)
    save_clip(folder / "clip", torch.float16)
    return folder


def evaluation_of(work):
    """Settings of three methods and two motions, as the YAML file that `evaluate` takes."""
    runs = f"{work}/runs/{{motion}}"
    return {
        "protocol": "learned_motion",
        "model": f"{work}/model",
        "methods": {
            "base": {},
            "ours": {"motion_lora": [runs]},
            "plain": {"motion_lora": [runs], "appearance_lora": [f"{runs}:0.5"], "noise_prior": runs},
        },
        "motions": {
            "right": {"references": [f"{work}/clips/right"], "prompts": PROMPTS},
            "left": {"references": [f"{work}/clips/left"], "prompts": PROMPTS[:1]},
        },
        "num_inference_steps": 1,
        "batch_size": 1,  # The company in a batch changes the last digits.
        "device": "cpu",
        "grid": 4,
        "fps": None,
    }


@pytest.fixture
def settings(work):
    return evaluation_of(work)


def evaluate(settings, output, *overrides):
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return main(["--config", str(path), "--output", str(output), *overrides])


def read_results(output):
    return json.loads((output / "results.json").read_text())


def videos(output, method="*"):
    return {str(path.relative_to(output)): path.read_bytes() for path in output.glob(f"videos/{method}/*/*.mp4")}


@pytest.fixture(scope="module")
def finished(work, tmp_path_factory):
    """Folder of an evaluation by all metrics."""
    output = tmp_path_factory.mktemp("finished") / "out"
    assert evaluate(evaluation_of(work), output, f"clip={work}/clip", f"pick_score={work}/clip") == 0
    return output


@pytest.fixture
def written(monkeypatch):
    """Paths of the videos that are made, in order."""
    paths, write_video = [], video_files.write_video

    def write(path, frames):
        paths.append(path)
        write_video(path, frames)

    monkeypatch.setattr(video_files, "write_video", write)
    return paths


def test_all_methods_stand_in_one_table(finished):
    record = read_results(finished)
    assert list(record["methods"]) == ["base", "ours", "plain"]
    for method in record["methods"].values():
        assert {"motion_fidelity", "clip_text", "clip_consistency", "pick_score"} <= method["figures"].keys()
        assert method["figures"]["pick_score"]["n"] == 3
        assert method["figures"]["pick_score"]["num_sources"] == 2, "intervals draw motions"
        assert method["motions"]["right"]["pick_score"]["num_sources"] == 2, "of one motion, prompts"
        assert method["figures"]["pick_score"]["low"] is None, "two motions are too few"
        assert -1 <= method["figures"]["motion_fidelity"]["mean"] <= 1
    counts = {"prompts": 2, "videos": 2, "reference_clips": 1, "reference_windows": 2}
    assert record["motions"]["right"] == counts
    base, ours = (record["methods"][name]["figures"]["clip_text"]["mean"] for name in ("base", "ours"))
    assert record["methods"]["ours"]["differences"]["clip_text"]["mean"] == pytest.approx(ours - base)
    lines = (finished / "table.md").read_text().splitlines()
    assert lines[0].startswith("| method | motion fidelity | tracked fraction | text alignment, 100 x CLIP | frame con")
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| base", "| ours", "| plain"]
    assert f"| {100 * base:.2f} |" in lines[2]
    assert "over motions (none for fewer than 6, where it would be too narrow)" in (finished / "table.md").read_text()
    assert {path.name for path in finished.glob("*.png")} == {"same_right.png", "same_left.png"}


def test_the_videos_are_those_of_sample_py(work, finished, tmp_path):
    assert len(set(videos(finished, "base").values())) == 2, "no motion changes the base model's videos"
    assert len(set(videos(finished).values())) == 2 + 3 + 3, "each motion has its own LoRA"
    run = work / "runs" / "left"
    options = ["--model", work / "model", "--steps", 1, "--prompt", PROMPTS[0], "--motion-lora", run, "--device", "cpu"]
    options += ["--appearance-lora", f"{run}:0.5", "--noise-prior", run, "--output", tmp_path / "sample"]
    assert sample.main([str(option) for option in options]) == 0
    (ours,) = (finished / "videos" / "plain" / "left").glob("a-red-circle-*.mp4")
    assert ours.read_bytes() == (tmp_path / "sample" / "a-red-circle-0.mp4").read_bytes()


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_more_costs_only_itself(settings, finished, tmp_path, monkeypatch, written):
    del settings["methods"]["base"], settings["methods"]["ours"]
    out, write = tmp_path / "out", video_files.write_video

    def write_or_die(path, frames):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, frames)

    with monkeypatch.context() as dying:
        dying.setattr(video_files, "write_video", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings, out)
    written.clear()
    assert evaluate(settings, out) == 0
    assert len(written) == 1
    assert videos(out) == videos(finished, "plain")
    assert evaluate(settings, out, "frame_pairs=all", "batch_size=3") == 0
    assert len(written) == 1

    del settings["motions"]["left"]
    settings["motions"]["right"]["prompts"] = ["a star", PROMPTS[0]]
    assert evaluate(settings, out, "seeds=[0,3]") == 0
    assert len(written) == 1 + 3, "a prompt's videos keep their names"
    assert read_results(out)["methods"]["plain"]["figures"]["motion_fidelity"]["n"] == 4
    assert len({path.read_bytes() for path in written}) == 4, "each prompt and seed"


def test_videos_of_other_settings_are_never_taken(settings, work, finished, tmp_path, capsys, written):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    lora = work / "runs" / "right" / "motion_lora" / "pytorch_lora_weights.safetensors"
    changes = ["num_inference_steps=2", "negative_prompt=a", f'methods.ours.motion_lora=["{work}/runs/{{motion}}:0.5"]']
    for change in (*changes, "methods.ours.motion_lora=[]", "methods.plain.noise_prior=null"):
        assert evaluate(settings, out, change) == 2
        assert "was made with other settings: motion " in capsys.readouterr().err
    date = lora.stat().st_mtime_ns
    try:
        os.utime(lora, ns=(0, 0))
        assert evaluate(settings, out) == 2, "trained again"
        assert f"was made with other settings: motion right.weights.{lora} was [" in capsys.readouterr().err
    finally:
        os.utime(lora, ns=(date, date))
    assert not written


def test_a_video_that_moves_as_a_reference_does_scores_one(settings, tmp_path):
    """Puts clips in the place of a method's videos, of the second window and of the opposite motion."""
    out = tmp_path / "out"
    settings["methods"] = {"base": {}}
    settings["motions"].pop("left")
    assert evaluate(settings, out) == 0
    (first, second) = sorted((out / "videos" / "base" / "right").glob("*.mp4"))
    write_clip(first, 1)
    write_clip(second, -2)
    assert evaluate(settings, out) == 0
    scores = {path.stem: json.loads(path.read_text()) for path in (out / "scores").rglob("*.json")}
    assert scores[first.stem]["motion_fidelity"] > 0.97, "slower, in the same direction"
    assert scores[second.stem]["motion_fidelity"] < -0.97
    assert scores[first.stem]["moving_fraction"] > 0.3
    assert len(scores) == 2


def test_an_instrument_that_fails_leaves_the_rest(settings, work, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    settings["methods"] = {"base": {}}
    settings["motions"].pop("left")
    out, clip = tmp_path / "out", [f"clip={work}/clip", f"pick_score={work}/clip"]
    with monkeypatch.context() as broken:
        broken.setattr(learned_motion.PickScorer, "__call__", fail)
        assert evaluate(settings, out, *clip) == 1
    assert (
        "not measured: pick_score, base: 2 of 2 videos, RuntimeError: CUDA out of memory.\n" in capsys.readouterr().err
    )
    assert "NOT MEASURED: pick_score" in (out / "table.md").read_text()
    assert read_results(out)["methods"]["base"]["figures"]["clip_text"]["n"] == 2
    assert evaluate(settings, out, *clip) == 0
    assert read_results(out)["methods"]["base"]["figures"]["pick_score"]["n"] == 2


def test_videos_begin_with_their_images(settings, work, tmp_path, written):
    settings["methods"] = {"ours": settings["methods"]["ours"]}
    settings["motions"].pop("left")
    images = []
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        images.append(tmp_path / f"{name}.png")
        Image.new("RGB", (40, 40), colour).save(images[-1])
    settings["motions"]["right"]["images"] = list(map(str, images))
    out = tmp_path / "out"
    assert evaluate(settings, out, "batch_size=2") == 0
    for path, image, prompt in zip(written, images, PROMPTS, strict=True):
        options = [
            "--model",
            work / "model",
            "--steps",
            1,
            "--prompt",
            prompt,
            "--motion-lora",
            work / "runs" / "right",
        ]
        options += ["--image", image, "--device", "cpu", "--output", tmp_path / image.stem]
        assert sample.main([str(option) for option in options]) == 0
        own, theirs = iio.imread(path).astype(int), iio.imread(tmp_path / image.stem / "video-0.mp4").astype(int)
        assert abs(own - theirs).mean() < 1, "the company in a batch changes the last digits"
    written.clear()
    assert evaluate(settings, out) == 0
    assert not written
    Image.new("RGB", (40, 40), (30, 200, 30)).save(images[0])
    assert evaluate(settings, out) == 0
    assert len(written) == 1, "of the image that changed"


def ask_base_alone(**motion):
    return {"methods": {"base": {}}, "motions": {"m": {"prompts": ["a"], "references": ["x"], **motion}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": {"ours": {"motion_lora": ["{work}/nowhere/{motion}"]}}}, ["ours, motion right", "nowhere/right"]),
        ({"methods": {"ours": {"noise_prior": "{work}/clips/{motion}"}}}, ["clips/right", "no noise prior"]),
        ({"methods": {"ours": {"motion_lora": ["{work}/wide"]}}}, ["method ours", "another base"]),
        ({"methods": {"ours": {"model": "nowhere"}}}, ["no model folder at nowhere"]),
        (ask_base_alone(references=["{work}/none"]), ["motion m", "no such file or folder"]),
        (ask_base_alone(references=["{work}/clips/left"], prompts=[]), ["motion m has no prompts"]),
        (ask_base_alone(references=["{work}/clips/left"], prompt_file="no.txt"), ["motion m", "no.txt"]),
        (ask_base_alone(references=["{work}/clips/left"], prompts=["a", " a"]), ["the prompt 'a' twice"]),
        (ask_base_alone(images=["{work}/a.png", "b.png"]), ["motion m", "1 prompts and 2 images"]),
        (ask_base_alone(images=["{work}/none.png"]), ["motion m", "no image at", "none.png"]),
        (ask_base_alone(references=["{work}/still"]), ["motion m", "follows nothing that moves"]),
        ({**ask_base_alone(references=["{work}/clips/left"]), "num_frames": 8}, ["4 frames, 8 are needed"]),
        ({"clip": "{work}"}, ["clip: no CLIP model", "config.json is missing"]),
        ({"pick_score": "{work}/nowhere"}, ["pick_score: no CLIP model"]),
        ({"tracker": "cotracker", "cotracker": "{work}"}, ["no clone of CoTracker"]),
    ],
)
def test_bad_input_is_one_line_before_weights_are_loaded(work, settings, tmp_path, capsys, monkeypatch, change, words):
    settings |= json.loads(json.dumps(change).replace("{work}", str(work)))
    monkeypatch.setattr(learned_motion, "load_pipeline", lambda _: pytest.fail("weights were loaded"))
    assert evaluate(settings, tmp_path / "out") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert all(word in line for word in words), line
    assert not (tmp_path / "out" / "videos").exists()


def test_the_protocol_decides_which_settings_there_are(tmp_path, capsys):
    assert choose_protocol([]) is EvaluateConfig
    assert choose_protocol(["--config", str(ROOT / "configs/evaluate/table1.yaml"), "--output", "x"]) is EvaluateConfig
    assert choose_protocol(["--output", "x", "protocol=learned_motion"]) is LearnedMotionConfig
    assert all(choose_protocol(["--config", str(path), "--help"]) is LearnedMotionConfig for path in CONFIGS)
    output = ["--output", str(tmp_path / "out")]
    assert main(["protocol=learnt_motion", *output]) == 2
    assert "protocol must be one of drawn_motion, learned_motion, boxes, got 'learnt_motion'" in capsys.readouterr().err
    assert main(["export-requests", "--config", str(CONFIGS[0]), *output]) == 2
    assert "export-requests is for drawn motion" in capsys.readouterr().err
    for arguments, advice in (
        (["--config", str(CONFIGS[0]), "seed=1"], "did you mean 'seeds'?"),
        (["--config", str(CONFIGS[0]), "frechet=[fid]"], "it is a setting of protocol drawn_motion or boxes"),
        (["--config", str(CONFIGS[0]), "dino=x"], "it is a setting of protocol boxes"),
        (["model=m", "pick_score=x"], "it is a setting of protocol learned_motion"),
        (["model=m", "dino=x"], "it is a setting of protocol boxes"),
        (["--config", str(CONFIGS[0]), "methods.ours.motion_loras=[a]"], "did you mean 'methods.ours.motion_lora'?"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *output])
        assert stopped.value.code == 2
        assert advice in capsys.readouterr().err


def test_help_and_mistyped_keys_of_the_protocol_answer_without_torch():
    check = "import sys; from imageconductor.__main__ import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    check += "assert 'torch' not in sys.modules and 'cv2' not in sys.modules"
    for more, text in (("--help", "reference_choice=best"), ("clipp=x", "did you mean 'clip'?")):
        command = [sys.executable, "-c", check, "evaluate", "--config", str(CONFIGS[0]), "--output", "x", more]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        assert text in done.stdout + done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_load_and_compare_the_baselines(path):
    config = config_file.load(LearnedMotionConfig, path)
    assert list(config.methods) == ["base", "ours", "plain_lora", "without_debiasing"]
    assert len(config.motions) > 1
    assert all(motion.read_prompts(name) for name, motion in config.motions.items())
    plain = config.methods["plain_lora"].of_motion("a motion")
    assert plain.appearance_lora == plain.motion_lora
    assert "/a motion" in plain.motion_lora[0]


def test_prompts_of_a_list_and_of_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("b  c\n\n d\n", encoding="utf-16")
    assert LearnedMotion(["x"], ["a"], str(tmp_path / "prompts.txt")).read_prompts("m") == ["a", "b c", "d"]


def test_every_prompt_and_seed_has_files_of_its_own():
    requests = [VideoRequest("m", prompt, seed) for prompt in ("a cat", "A cat!", "猫", "a" * 300) for seed in (0, 1)]
    assert len({request.key for request in requests}) == len(requests)
    assert max(len(request.key) for request in requests) < 64


def test_configs_that_cannot_be(work, tmp_path):
    good = {"model": "m", "methods": {"a": LearnedMethod()}, "motions": {"m": LearnedMotion(["x"], ["p"])}}
    for change, match in (
        ({"methods": {}}, "give methods"),
        ({"model": None}, "method a has no model"),
        ({"motions": {"a/b": LearnedMotion(["x"])}}, "'a/b' cannot be one"),
        ({"motions": {"m": LearnedMotion()}}, "motion m has no references"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"grid": 1}, "grid must be at least 2"),
        ({"still_fraction": 1.0}, r"in \[0, 1\)"),
        ({"cotracker": "clone"}, "cotracker goes with tracker=cotracker"),
    ):
        with pytest.raises(ValueError, match=match):
            LearnedMotionConfig(**(good | change))
    methods = {"a": LearnedMethod(f"{work}/model"), "b": LearnedMethod("models/sprites")}
    motion = LearnedMotion([f"{work}/clips/left"], ["p"])
    config = LearnedMotionConfig(methods=methods, motions={"m": motion}, device="cpu")
    with pytest.raises(ValueError, match="a 32x32x4 and b 128x128x16; set size and num_frames"):
        LearnedMotionEvaluation(config, tmp_path / "out")
