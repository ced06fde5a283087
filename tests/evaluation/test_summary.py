"""What an evaluation keeps when something cannot be measured, what it computes once, and its tables."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from imageconductor.evaluation import summary
from imageconductor.evaluation.appearance import ClipScorer
from imageconductor.evaluation.evaluate_config import EvaluateConfig
from imageconductor.evaluation.protocol import Evaluation
from imageconductor.evaluation.report import format_latex, format_markdown
from imageconductor.evaluation.scores import describe_failure, summarise_scores
from scripts.evaluate import main

SCENES = ["motions=own", "num_scenes=3", "size=[64,64]", "num_frames=16", "device=cpu", "shown=1"]


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Linear(3, 400)

    def forward(self, x: torch.Tensor):
        return self.logits(x.mean(dim=[3, 4]).amax(dim=2))


@pytest.fixture
def counted(monkeypatch):
    """Names of the distances whose network saw videos, in order."""
    collected, collect = [], summary.collect_statistics

    def count(name, *arguments, **settings):
        collected.append(name)
        return collect(name, *arguments, **settings)

    monkeypatch.setattr(summary, "collect_statistics", count)
    return collected


def test_a_distance_that_fails_costs_nothing_but_itself(exact, tmp_path, capsys, counted):
    network = tmp_path / "i3d.pt"
    network.write_bytes(b"no network")
    reference = f"reference={exact}"
    command = [f"videos={exact}", *SCENES, "frechet=[frechet_small,fvd]", f"fvd_weights={network}", reference]
    command += ["--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert f"not measured: fvd, exact: ValueError: {network} is no TorchScript file" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    distances = record["methods"]["exact"]["frechet"]
    assert distances["frechet_small"]["value"] == pytest.approx(0, abs=1e-6)
    assert "is no TorchScript file" in distances["fvd"]["failed"]
    assert record["cam_mc"] < 1
    assert "NOT MEASURED: fvd, exact: " in (tmp_path / "out" / "table.md").read_text()
    assert "NOT MEASURED" in (tmp_path / "out" / "report.html").read_text()

    torch.jit.script(Plain().eval()).save(str(network))
    counted.clear()
    assert main(command) == 0
    assert counted == ["fvd", "fvd"], "the reference and the method; what was there is not computed again"
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["methods"]["exact"]["frechet"]["fvd"]["value"] == pytest.approx(0, abs=1e-5)


def test_references_are_read_once_for_all_methods(exact, tmp_path, counted):
    shutil.copytree(exact, tmp_path / "other")
    command = [f"videos={exact}", *SCENES, "num_scenes=1", "frechet=[frechet_small]", "num_reference=4"]
    command += ["--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert len(counted) == 2
    counted.clear()
    assert main([*command, f"methods={{other: {{videos: {tmp_path / 'other'}}}}}"]) == 0
    assert len(counted) == 1, "the new method alone"
    counted.clear()
    assert main([*command, "num_reference=5"]) == 0
    assert len(counted) == 2, "another reference"


def test_a_clip_that_fails_leaves_the_other_scores(exact, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(ClipScorer, "__init__", lambda *_: None)
    monkeypatch.setattr(ClipScorer, "__call__", fail)
    command = [f"videos={exact}", *SCENES, "num_scenes=1", "clip=somewhere", "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert "not measured: clip, exact: 2 of 2 videos, RuntimeError: out of memory\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["cam_mc"] < 1
    monkeypatch.setattr(ClipScorer, "__call__", lambda *_: (0.25, 0.75))
    assert main(command) == 0
    tasks = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]["exact"]["tasks"]
    assert tasks["camera"]["clip_text"]["mean"] == 0.25


def test_a_metric_that_one_video_lacks_is_summarised_over_the_others():
    scores = [{"source": str(i), "error": value, "first_frame_psnr": 30.0} for i, value in enumerate((None, 5.0, None))]
    found = summarise_scores([{"source": "x", "first_frame_psnr": 30.0}, *scores], scale=2)
    assert (found["error"]["n"], found["error"]["mean"], found["error_384x256"]["mean"]) == (1, 5, 10)
    assert found["first_frame_psnr"]["n"] == 4


def test_methods_are_compared_request_by_request(exact, write_videos, tmp_path):
    def stop(request):
        return np.repeat(request.truth[:1], 16, axis=0)

    config = EvaluateConfig(motions="own", num_scenes=3, size=(64, 64), num_frames=16, videos=str(exact), device="cpu")
    still = write_videos(tmp_path / "still", config, stop)
    command = [f"videos={exact}", f"methods={{still: {{videos: {still}}}}}", *SCENES]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    methods = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert methods["exact"]["differences"] == {}
    difference = methods["still"]["differences"]["camera"]["error_all_points"]
    means = [methods[name]["tasks"]["camera"]["error_all_points"]["mean"] for name in ("still", "exact")]
    assert difference["mean"] == pytest.approx(means[0] - means[1])
    assert difference["low"] > 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| difference to exact | task | error, px at 384x256 |" in table
    assert "\n| still | camera | +" in table


def test_tables_have_the_papers_lines_beside_ours(exact, tmp_path):
    settings = {"motions": "own", "num_scenes": 3, "size": (64, 64), "num_frames": 16, "device": "cpu"}
    record = Evaluation(EvaluateConfig(videos=str(exact), **settings), tmp_path / "out").run()
    assert record is not None
    table = format_markdown(record)
    assert "| DragNUWA (paper) | 237.26 | 1283.85 | 48.72 | 51.24 | – | – | – |" in table
    camera, dragged = (record["methods"]["exact"]["tasks"][task] for task in ("camera", "object"))
    assert f"| exact | – | – | {camera['error_384x256']['mean']:.2f} (" in table
    assert f" | {dragged['error_all_points_384x256']['mean']:.2f} (" in table.splitlines()[5]
    camera["error_384x256"]["n"] = 1
    assert "), n = 1 |" in format_markdown(record).split("\n\n")[1]
    record["methods"]["a_b & 50%"] = record["methods"].pop("exact")
    text = format_latex(record)
    assert r"a\_b \& 50\% & -- & --" in text
    assert text.count(r"\\") == 5
    assert text.startswith("\\begin{tabular}{lrrrrrrr}")


def test_a_failure_is_told_in_one_line():
    assert describe_failure(ValueError("first\nsecond")) == "ValueError: first"
    assert describe_failure(MemoryError()) == "MemoryError: no message"
