"""`imageconductor NAME`: what it runs, how soon it answers, and where it finds what the package brings along."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from imageconductor.__main__ import COMMANDS, main
from imageconductor.files import find_shipped

ROOT = Path(__file__).parents[2]


def test_usage_names_every_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    assert main([]) == 2
    modules = {path.stem for path in (ROOT / "imageconductor" / "commands").glob("[a-z]*.py")}
    assert modules == set(COMMANDS)


def test_a_mistyped_command_is_told_which_was_meant(capsys):
    assert main(["evalute", "--output", "x"]) == 2
    assert capsys.readouterr().err == "error: imageconductor has no command 'evalute'; did you mean evaluate?\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_without_loading_torch(name):
    check = "import sys; from imageconductor.__main__ import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    check += "assert 'torch' not in sys.modules and 'cv2' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check, name, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: imageconductor {name} ")


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("sample.py", "sample"),
        ("train.py", "train"),
        ("scripts/curate.py", "curate"),
        ("scripts/evaluate.py", "evaluate"),
        ("scripts/assemble_model.py", "assemble"),
    ],
)
def test_scripts_are_doors_to_the_same_functions(script, command):
    spec = importlib.util.spec_from_file_location(f"door_{command}", ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    door = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(door)
    assert door.main is importlib.import_module(f"imageconductor.commands.{command}").main


def test_a_command_takes_shipped_settings_and_says_which_model_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "configs/train/sprites/camera_lora.yaml", "model=nowhere"]) == 2
    assert "no model folder at nowhere" in capsys.readouterr().err
    Image.new("RGB", (64, 64)).save("picture.png")
    quick = ["--steps", "1", "--num-frames", "2", "--device", "cpu"]
    assert main(["sample", "--image", "picture.png", *quick, "--output", "out"]) == 0
    assert f"model: {ROOT / 'models' / 'sprites'}\n" in capsys.readouterr().err


def test_shipped_files_are_found_from_any_folder_and_give_way_to_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_shipped("configs/sample/sprites.yaml") == ROOT / "configs/sample/sprites.yaml"
    assert find_shipped("models/sprites") == ROOT / "models/sprites"
    for other in ("configs/none.yaml", "README.md", "/models/sprites", "../configs/sample/sprites.yaml", ""):
        assert find_shipped(other) == Path(other)
    (tmp_path / "models" / "sprites").mkdir(parents=True)
    assert find_shipped("models/sprites") == Path("models/sprites")
