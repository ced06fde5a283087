"""The report on a GPU: it goes on whatever a part does, and needs few packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_report
import pytest
from gpu_report import Outcome, run_parts, to_markdown
from report_parts import PARTS, Part

ROOT = Path(__file__).parents[2]
ABSENT = "cv2 decord imageio imageio_ffmpeg webdataset braceexpand tensorboard jinja2 av ray pyarrow scenedetect"
ABSENT += " pebble gradio pytest hypothesis matplotlib torchmetrics"
_BARE_MACHINE = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
present = lambda cls, name, *more: None if name.split(".")[0] in {ABSENT.split()} else find(name, *more)
PathFinder.find_spec = classmethod(present)
"""
_PART = """
import json, os, subprocess, sys, time
def say(**row): print(json.dumps(row), flush=True)
def fine(): print("a library's line"); say(seconds=0.1234567, size=3)
def broken(): say(size=4); raise RuntimeError(f"out of memory in {os.environ['HOME']}/project")
def endless(): child = subprocess.Popen(["sleep", "60"]); say(child=child.pid); time.sleep(60)
globals()[sys.argv[1]]()
"""


@pytest.fixture
def bare_machine(tmp_path):
    """Environment of a process that finds nothing beyond the packages which the report may ask for."""
    (tmp_path / "sitecustomize.py").write_text(_BARE_MACHINE)
    return {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}


def has_ended(pid):
    """Whether a process is gone, or only waits to be counted out."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_parts_that_fail_or_hang_leave_their_rows_and_the_rest_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "_LEAST_S", 0.5)
    script = tmp_path / "part.py"
    script.write_text(_PART)
    names = {"broken": 60, "endless": 1.5, "fine": 60}
    parts = {name: Part(name.title(), limit, lambda *_: iter(())) for name, limit in names.items()}
    broken, endless, fine = run_parts(parts, [sys.executable, str(script)], minutes=1)
    assert (broken.status, broken.rows) == ("failed", [{"size": 4}])
    assert broken.error.endswith("RuntimeError: out of memory in ~/project\n")
    assert endless.status == "stopped"
    assert endless.seconds < 30
    assert has_ended(endless.rows[0]["child"])
    assert (fine.status, fine.rows) == ("done", [{"seconds": 0.1234567, "size": 3}])

    said = to_markdown({"device": "none"}, {"size": "tiny"}, [fine, Outcome("Late", "not run")])
    assert "## Fine: done" in said
    assert "| seconds | size |\n| --- | --- |\n| 0.123 | 3 |" in said
    assert "## Late: not run" in said


def test_no_part_is_begun_when_the_time_is_over():
    assert {outcome.status for outcome in run_parts(PARTS, ["does-not-exist"], minutes=0)} == {"not run"}


@pytest.mark.slow
def test_without_a_gpu_it_says_that_there_is_nothing_to_report(bare_machine):
    command = [sys.executable, "benchmarks/gpu_report.py"]
    environment = bare_machine | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "without one there is nothing to report; --size tiny --device cpu tries" in done.stderr


@pytest.mark.slow
def test_the_report_runs_on_a_machine_with_few_packages(bare_machine, tmp_path):
    # One of each kind; those that are left out differ in a setting, or wait for the compiler.
    parts = ["tests", "sampling-float16", "decoding", "call-model", "training-object_lora", "fsdp"]
    command = [sys.executable, "benchmarks/gpu_report.py", "--size", "tiny", "--device", "cpu", "--minutes", "40"]
    output = ["--output", str(tmp_path / "report")]
    subprocess.run([*command, *output, "--parts", *parts], cwd=ROOT, env=bare_machine, check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    found = {part["title"]: part for part in report["parts"]}
    assert {name: part["error"] for name, part in found.items() if part["status"] != "done"} == {}
    assert len(found) == len(parts)
    assert found["Tests that need a GPU"]["rows"] == [{"tests": "not run: pytest and hypothesis not installed"}]
    guided = found["A guided step, float16, eager"]["rows"]
    assert {(row["videos"], row["guidance"], row["schedule"]) for row in guided} == {
        (videos, guidance, schedule)
        for videos in (1, 4)
        for guidance in ("classifier-free", "Eq. 5")
        for schedule in ("published", "shared", "kept")
    }
    assert all(part["rows"] for part in found.values())
    for suffix in ("md", "json"):
        text = (tmp_path / f"report.{suffix}").read_text()
        assert len(text) < 1_000_000
        assert str(ROOT) not in text
