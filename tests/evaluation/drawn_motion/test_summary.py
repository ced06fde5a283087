"""What an evaluation keeps when something cannot be measured, what it computes once, and its tables."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from imageconductor.commands.evaluate import main
from imageconductor.evaluation.drawn_motion import distances, reference_statistics
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig, Method
from imageconductor.evaluation.drawn_motion.protocol import Evaluation
from imageconductor.evaluation.drawn_motion.report import format_latex, format_markdown
from imageconductor.evaluation.metrics.appearance import ClipScorer
from imageconductor.evaluation.scores import describe_failure, summarise_scores

SCENES = ["motions=own", "num_scenes=3", "size=[64,64]", "num_frames=16", "device=cpu", "shown=1"]


class Plain(nn.Module):
    def __init__(self, channels: int = 3):
        super().__init__()
        self.logits = nn.Linear(channels, 400)

    def forward(self, x: torch.Tensor):
        return self.logits(x.mean(dim=[3, 4]).amax(dim=2))


@pytest.fixture
def counted(monkeypatch):
    """Names of the distances whose network saw videos, in order."""
    collected, collect = [], distances.collect_statistics

    def count(name, *arguments, **settings):
        collected.append(name)
        return collect(name, *arguments, **settings)

    for module in (distances, reference_statistics):
        monkeypatch.setattr(module, "collect_statistics", count)
    return collected


@pytest.mark.slow
def test_a_distance_that_fails_costs_nothing_but_itself(exact, tmp_path, capsys, counted):
    network = tmp_path / "i3d.pt"
    torch.jit.script(Plain(4).eval()).save(str(network))  # It wants four channels.
    reference = f"reference={exact}"
    command = [f"videos={exact}", *SCENES, "frechet=[frechet_small,fvd]", f"fvd_weights={network}", reference]
    command += ["--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert "not measured: fvd, exact: RuntimeError: " in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    found = record["methods"]["exact"]["frechet"]
    assert found["frechet_small"]["value"] == pytest.approx(0, abs=1e-6)
    assert "RuntimeError" in found["fvd"]["failed"]
    assert record["cam_mc"] < 1
    assert "NOT MEASURED: fvd, exact: " in (tmp_path / "out" / "table.md").read_text()
    assert "NOT MEASURED" in (tmp_path / "out" / "report.html").read_text()

    torch.jit.script(Plain().eval()).save(str(network))
    counted.clear()
    assert main(command) == 0
    assert counted == ["fvd", "fvd"], "the reference and the method; what was there is not computed again"
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["methods"]["exact"]["frechet"]["fvd"]["value"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
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


def test_processes_share_the_reference_videos(exact, tmp_path, monkeypatch):
    """Each takes its part, the sum is that of one process, and what was computed before a stop is kept."""
    settings = {"videos": str(exact), "motions": "own", "num_scenes": 1, "size": (64, 64), "num_frames": 16}
    config = EvaluateConfig(**settings, device="cpu", frechet=["frechet_small"], num_reference=37)
    read, read_references = [], reference_statistics.read_references

    def count(config, size, num_frames, numbers):
        read.append(list(numbers))
        return read_references(config, size, num_frames, numbers)

    monkeypatch.setattr(reference_statistics, "read_references", count)
    alone, shared = (Evaluation(config, tmp_path / name) for name in ("alone", "shared"))
    wanted = alone.formats["exact"]
    expected = reference_statistics.load_reference(alone, "frechet_small", wanted)
    assert read == [list(range(18)), list(range(18, 37))]
    for index, videos in enumerate(read.copy()):
        shared.state = SimpleNamespace(process_index=index, num_processes=2)
        reference_statistics.collect_own_part(shared, "frechet_small", wanted)
        assert read[-1] == videos
    read.clear()
    assert len(list((tmp_path / "shared" / "reference").iterdir())) == 2
    found = reference_statistics.load_reference(shared, "frechet_small", wanted)
    assert read == [], "the parts are there"
    assert len(list((tmp_path / "shared" / "reference").iterdir())) == 1
    assert found.count == expected.count == 37
    assert torch.equal(found.products, expected.products)


def write_failing_cotracker(clone):
    """A repository like CoTracker's, whose network has weights; with a file `broken` it fails from its second video on.

    Each video is a line in the file `calls`.
    """
    clone.mkdir()
    (clone / "hubconf.py").write_text(
        "from pathlib import Path\n"
        "import torch\n"
        "class Tracker(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.step = torch.nn.Parameter(torch.zeros(2))\n"
        "        self.register_buffer('scale', torch.ones(1))\n"
        "    def forward(self, video, queries):\n"
        f"        here = Path({str(clone)!r})\n"
        "        calls = (here / 'calls').read_text() if (here / 'calls').exists() else ''\n"
        "        (here / 'calls').write_text(calls + 'x\\n')\n"
        "        if (here / 'broken').exists() and calls:\n"
        "            raise RuntimeError('CUDA out of memory.\\nTried to allocate')\n"
        "        times = torch.arange(video.shape[1])[None, :, None, None]\n"
        "        tracks = queries[:, None, :, 1:] + times * self.step * self.scale\n"
        "        return tracks, torch.ones_like(tracks[..., 0], dtype=torch.bool)\n"
        "def cotracker3_offline():\n"
        "    return Tracker()\n"
    )


def test_a_tracker_that_fails_leaves_the_rest(exact, tmp_path, capsys):
    clone = tmp_path / "clone"
    write_failing_cotracker(clone)
    (clone / "broken").touch()
    command = [f"videos={exact}", *SCENES, "num_scenes=1", "tracker=cotracker", f"cotracker={clone}"]
    command += ["frechet=[frechet_small]", "num_reference=4", "--output", str(tmp_path / "out")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "not measured: tracker, exact: 2 of 2 videos, RuntimeError: CUDA out of memory.\n" in error
    assert "not measured: tracker, true clips: 1 of 2 videos, RuntimeError: CUDA out of memory.\n" in error
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    method = record["methods"]["exact"]
    assert method["failed"] == {"tracker": "2 of 2 videos, RuntimeError: CUDA out of memory."}
    assert method["tasks"]["camera"]["first_frame_psnr"]["mean"] > 20
    assert "error" not in method["tasks"]["camera"]
    assert method["frechet"]["frechet_small"]["value"] > 0
    assert "NOT MEASURED: tracker, exact" in (tmp_path / "out" / "table.md").read_text()
    assert len((clone / "calls").read_text().split()) == 4

    (clone / "broken").unlink()
    (clone / "calls").unlink()
    assert main(command) == 0
    assert len((clone / "calls").read_text().split()) == 3, "one true clip was measured"
    tasks = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]["exact"]["tasks"]
    # A point that is seen to stand still is as far off as in a motionless video.
    assert tasks["object"]["error"]["mean"] == pytest.approx(tasks["object"]["still"]["mean"])
    assert main(command) == 0
    assert len((clone / "calls").read_text().split()) == 3, "nothing is missing any more"


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
    assert difference["mean"] > 0
    errors = {}
    for name, lost in (("still", 0), ("exact", 2)):  # each could not be measured on another request
        paths = sorted((tmp_path / "out" / "scores" / name / "camera").iterdir(), key=lambda path: path.stat().st_mtime)
        scores = [json.loads(path.read_text()) for path in paths]
        errors[name] = [score["error_all_points"] for score in scores]
        paths[lost].write_text(json.dumps(scores[lost] | {"error_all_points": None}))
    both = replace(config, methods={"still": Method(videos=str(still))})
    methods = Evaluation(both, tmp_path / "out").run()["methods"]
    difference = methods["still"]["differences"]["camera"]["error_all_points"]
    assert (difference["n"], difference["mean"]) == (1, pytest.approx(errors["still"][1] - errors["exact"][1]))
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| difference to exact | task | error, px at 384x256 |" in table
    assert "\n| still | camera | +" in table


def test_tables_have_the_papers_lines_beside_ours(exact, tmp_path):
    settings = {"motions": "own", "num_scenes": 3, "size": (64, 64), "num_frames": 16, "device": "cpu"}
    record = Evaluation(EvaluateConfig(videos=str(exact), **settings), tmp_path / "out").run()
    assert record is not None
    table = format_markdown(record)
    assert "| DragNUWA (paper) | – | 237.26 | 1283.85 | 48.72 | 51.24 | – | – | – | – | – |" in table
    camera, dragged = (record["methods"]["exact"]["tasks"][task] for task in ("camera", "object"))
    assert f"| exact | 64x64x16 | – | – | {camera['error_384x256']['mean']:.2f} | " in table
    assert f" | {dragged['error_all_points_384x256']['mean']:.2f} | " in table.splitlines()[5]
    assert "(none for fewer than 6, where it would be too narrow)" in table
    camera["error_384x256"] |= {"low": 0.25, "high": 1.5, "n": 1}
    assert " (0.25 .. 1.50), n = 1 |" in format_markdown(record).split("\n\n")[1]
    record["methods"]["a_b & 50%"] = record["methods"].pop("exact")
    text = format_latex(record)
    assert r"a\_b \& 50\% & 64x64x16 & -- & --" in text
    assert text.count(r"\\") == 5
    assert text.startswith("\\begin{tabular}{lrrrrrrrrrr}")


def test_a_failure_is_told_in_one_line():
    assert describe_failure(ValueError("first\nsecond")) == "ValueError: first"
    assert describe_failure(MemoryError()) == "MemoryError: no message"
