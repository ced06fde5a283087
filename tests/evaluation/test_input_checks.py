"""What is wrong with the input of an evaluation is said in one line before a network computes anything."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import footage
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from imageconductor.commands.evaluate import main
from imageconductor.evaluation import input_checks
from imageconductor.evaluation.drawn_motion import input_checks as drawn_checks
from imageconductor.evaluation.drawn_motion import protocol
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
from imageconductor.evaluation.drawn_motion.reference_videos import read_references

OWN = ["motions=own", "num_scenes=1", "size=[64,64]", "num_frames=16", "device=cpu"]


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """A function that runs the command, makes sure that it refuses before any network is loaded, and gives the line."""

    def forbid(*_, **__):
        raise AssertionError("a network was loaded")

    for name in ("load_pipeline", "ClipScorer", "build_tracker"):
        monkeypatch.setattr(protocol, name, forbid)

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert not (tmp_path / "out").exists()
        return lines[0]

    return run


def test_networks_of_metrics(exact, tmp_path, refused):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"<!doctype html>")
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(1)}, other)
    videos = [f"videos={exact}", *OWN]
    assert f"fvd_weights: {damaged} is no TorchScript" in refused(*videos, "frechet=[fvd]", f"fvd_weights={damaged}")
    for file in (damaged, other):
        line = refused(*videos, "frechet=[fid]", f"fid_weights={file}")
        assert f"fid_weights: {file} does not hold pytorch-fid's Inception weights" in line
    assert "no CLIP model at nowhere/else/clip" in refused(*videos, "clip=nowhere/else/clip")
    line = refused(*videos, "tracker=cotracker", f"cotracker={tmp_path}")
    assert f"cotracker: {tmp_path} is no clone of CoTracker (hubconf.py is missing)" in line


@pytest.mark.parametrize("downloads", [True, False])
def test_one_process_of_a_machine_loads_cotracker_before_the_others(downloads, tmp_path, monkeypatch):
    """The stand-in for its repository is not there before it has been loaded once, and the loading may fail."""
    (tmp_path / "hubconf.py").write_text(
        "from pathlib import Path\n"
        "import time, torch\n"
        "def cotracker3_offline():\n"
        f"    folder = Path({str(tmp_path / 'downloaded')!r})\n"
        "    if not folder.exists():\n"
        "        folder.mkdir()\n"
        "        time.sleep(0.3)\n"
        f"        assert {downloads}, 'the network is down'\n"
        "        (folder / 'whole').touch()\n"
        "    assert (folder / 'whole').exists(), 'half of it'\n"
        "    return torch.nn.Linear(1, 1)\n"
    )
    barrier, here = threading.Barrier(2), threading.local()
    state = type("State", (), {"is_local_main_process": property(lambda _: here.is_first)})()
    state.wait_for_everyone = lambda: barrier.wait(timeout=20)
    monkeypatch.setattr(input_checks, "PartialState", lambda: state)
    config = EvaluateConfig(model="m", tracker="cotracker", cotracker=str(tmp_path))

    def load(is_first: bool) -> str:
        here.is_first = is_first
        try:
            return input_checks.build_tracker(config, "cpu").name
        except ValueError as error:
            return str(error).rpartition(": ")[2]

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(load, (False, True)))
    assert said == (["cotracker3_offline"] * 2 if downloads else ["half of it", "the network is down"])


def test_models_and_what_is_attached_to_them(tiny_model, tmp_path, refused):
    settings = ["num_scenes=1", "device=cpu", "clip=organisation/clip"]
    style_lora = Path(__file__).parents[2] / "models" / "sprites" / "style_lora" / "pytorch_lora_weights.safetensors"
    damaged = tmp_path / "style.safetensors"
    damaged.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    pickled = tmp_path / "style.ckpt"
    pickled.write_bytes(b"PK no archive")
    for files, said in (
        ("lora: [nowhere.safetensors]", "method a: no file at nowhere.safetensors"),
        (f"lora: ['{damaged}:0.5']", f"method a: {damaged} is a Git LFS pointer and not the file itself"),
        (f"lora: ['{pickled}']", f"method a: {pickled} is truncated or damaged"),
        (f"lora: ['{style_lora}']", f"method a: {style_lora} is for another base: this model has no layer"),
        (f"motion_lora: ['{style_lora}']", f"method a: {style_lora} is no motion LoRA"),
        (f"base: {damaged}", f"method a: {damaged} is a Git LFS pointer and not the file itself"),
        (f"base: {style_lora}", f"method a: {style_lora} is a LoRA and no base model; give it as lora"),
        ("size: [33, 32]", "method a: width and height must be multiples of"),
        ("few_step: true", f"method a: no file at {tiny_model / 'few_step_lora' / 'pytorch_lora_weights.safetensors'}"),
    ):
        assert said in refused(f"methods={{a: {{model: {tiny_model}, {files}}}}}", *settings)
    shutil.copytree(tiny_model, tmp_path / "text_to_video")
    unet = tmp_path / "text_to_video" / "unet" / "config.json"
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"_class_name": "UNet3DConditionModel"}))
    line = refused(f"model={unet.parents[1]}", "tasks={a: {control: base}}", *settings)
    assert "method text_to_video: a video of an image or trajectories needs ControlNets" in line


def test_reference_videos(exact, tmp_path, refused, caplog):
    footage.write(tmp_path / "reference" / "a.mp4", footage.pan(0, 20, (1, 0), size=(64, 64)))
    footage.write(tmp_path / "elsewhere" / "b.mp4", footage.pan(0, 40, (1, 0), size=(64, 64)))
    (tmp_path / "reference" / "link").symlink_to(tmp_path / "elsewhere")
    settings = [f"videos={exact}", *OWN, "frechet=[frechet_small]", f"reference={tmp_path / 'reference'}"]
    line = refused(*settings, "reference_stride=4")
    assert "reference: 2 of 2 files have fewer than 61 frames, as " in line
    assert "lower reference_stride=4" in line
    config = EvaluateConfig(videos="v", reference=str(tmp_path / "reference"), reference_stride=2)
    drawn_checks.check_references(config, 16, PartialState(cpu=True))
    assert f"1 of 2 files have fewer than 31 frames, as {tmp_path / 'reference' / 'a.mp4'} with 2" in caplog.text
    assert [video.shape for video in read_references(config, (32, 32), 16, range(2))] == [(16, 32, 32, 3)]
    assert "a.mp4 is left out: 10 of 16 frames" in caplog.text
    (tmp_path / "reference" / "link" / "c.mp4").write_bytes(b"no video")
    assert f"{tmp_path / 'reference' / 'link' / 'c.mp4'} cannot be read as a video" in refused(*settings)


def test_a_process_whose_reference_videos_are_all_too_short_goes_on_with_the_others(tmp_path, monkeypatch, caplog):
    """Two processes, as threads, with one file each: of 20 and of 40 frames."""
    for name, count in (("a", 20), ("b", 40)):
        footage.write(tmp_path / f"{name}.mp4", footage.pan(0, count, (1, 0), size=(64, 64)))
    barrier, told = threading.Barrier(2, timeout=20), []

    def gather(own):
        told.extend(own)
        barrier.wait()
        return list(told)

    monkeypatch.setattr(drawn_checks, "gather_object", gather)

    def check(stride: int) -> list[str]:
        told.clear()
        config = EvaluateConfig(videos="v", reference=str(tmp_path), reference_stride=stride)

        def of_process(index: int) -> str:
            state = SimpleNamespace(process_index=index, num_processes=2, is_main_process=index == 0)
            try:
                return str(drawn_checks.check_references(config, 16, cast(PartialState, state)))
            except ValueError as error:
                return str(error)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(of_process, range(2)))

    assert check(2) == ["None", "None"]
    (said,) = [record.getMessage() for record in caplog.records if "reference: " in record.getMessage()]
    assert f"1 of 2 files have fewer than 31 frames, as {tmp_path / 'a.mp4'} with 2" in said
    assert all("2 of 2 files have fewer than 61 frames" in error for error in check(4))


def test_videos_of_others(exact, tmp_path, refused):
    for path in exact.rglob("*.mp4"):
        (tmp_path / "theirs" / path.parent.name).mkdir(parents=True, exist_ok=True)
        os.link(path, tmp_path / "theirs" / path.parent.name / path.name)
    method = f"methods={{theirs: {{videos: {tmp_path / 'theirs'}, size: [96, 64]}}}}"
    assert "whose aspect ratio is not that of 96x64" in refused(method, *OWN, "clip=organisation/clip")


def test_places_that_cannot_be_written(exact, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        assert main([f"videos={exact}", *OWN, "--output", str(output)]) == 2
        assert f"{output} cannot be written: {tmp_path / 'file'} is no folder" in capsys.readouterr().err


def test_images_are_read_first(tiny_model, tmp_path, refused):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (64, 64)).save(images / "a.png")
    (images / "a.json").write_text(json.dumps({"caption": "", "objects": [[32, 32]]}))
    (images / "b.png").write_bytes((images / "a.png").read_bytes()[:60])
    (images / "b.json").write_bytes((images / "a.json").read_bytes())
    assert f"{images / 'b.png'}: damaged image" in refused(f"model={tiny_model}", f"images={images}", "device=cpu")
