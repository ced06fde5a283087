"""Faults that lie in no footage: a network that fails, storage that goes away. The run stops and can be continued."""

from collections import Counter
from dataclasses import replace

import footage
import numpy as np
import pytest

from imageconductor.curation import executors, steps
from imageconductor.curation.curate import curate
from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.executors import Failure
from imageconductor.curation.passes import Annotate
from imageconductor.curation.run_folder import Run


class Here:
    """Stands for `executors.Workers`: works in this process, and fails at what `fails` says.

    Attributes:
        calls: Number of clips that each step worked on.
    """

    def __init__(self):
        self.fails = lambda _step, _count: False
        self.calls = Counter()

    def run(self, chunk_pass, todo, tick):
        for chunk in todo:
            chunk_pass.work(chunk, self, tick)

    def map(self, function, items):
        for item in items:
            self.calls[function.__name__] += 1
            is_bad = self.fails(function.__name__, self.calls[function.__name__])
            yield Failure("failed", "TypeError: no") if is_bad else function(*item)

    def map_batches(self, function, items, *args, size):  # noqa: ARG002 - the interface
        results = self.map(function, [([item], *args) for item in items])
        yield from (one if isinstance(one, Failure) else one[0] for one in results)


class Lost:
    """A tracker that loses every point."""

    name = version = "lost"

    def track(self, frames, points):
        shape = (len(points), len(frames))
        return np.zeros((*shape, 2)), np.zeros(shape, bool)


@pytest.fixture
def here(monkeypatch):
    """Workers in this process."""
    here = Here()
    monkeypatch.setattr(executors, "run", here.run)
    return here


@pytest.fixture
def config(tmp_path):
    """Settings for three clips in two chunks."""
    for number in range(3):
        footage.write(tmp_path / "videos" / f"{number}.mp4", footage.pan(number, 20, (1, 0)))
    fast = {"num_frames": 8, "size": (96, 64), "grid": 4, "drop_fraction": 0.0, "clips_per_shard": 2}
    return CurateConfig(str(tmp_path / "videos"), str(tmp_path / "out"), **fast)


@pytest.mark.parametrize("step", ["scan", "score", "annotate"])
def test_a_pass_in_which_most_clips_fail_stops_the_run_and_is_done_again(step, here, config, tmp_path):
    here.fails = lambda called, count: called == step and count in (1, 3)
    told = f"^{step}: 2 of 3 clips failed, the first with failed: TypeError: no; mend the cause and start"
    with pytest.raises(RuntimeError, match=told):
        curate(config)
    assert (tmp_path / "out" / "work").exists()
    assert not (tmp_path / "out" / "index.parquet").exists()
    here.fails = lambda _step, _count: False
    assert curate(config) == {"accepted": 3}
    assert here.calls == {"scan": 3, "score": 3, "annotate": 3} | {step: 6}


def test_failures_before_an_interruption_count_too(here, config, monkeypatch):
    def run_and_die(chunk_pass, todo, tick):
        here.run(chunk_pass, todo, tick)
        if isinstance(chunk_pass, Annotate):
            raise KeyboardInterrupt

    here.fails = lambda called, _: called == "annotate"
    with monkeypatch.context() as patch:
        patch.setattr(executors, "run", run_and_die)
        with pytest.raises(KeyboardInterrupt):
            curate(config)
    with pytest.raises(RuntimeError, match=r"^annotate: 3 of 3 clips failed"):
        curate(config)


def test_a_few_clips_that_fail_are_rejected(here, config):
    here.fails = lambda called, count: called == "annotate" and count == 2
    assert curate(config) == {"accepted": 2, "failed": 1}


def test_footage_that_is_missing_is_rejected_unless_all_of_it_went_away(here, config, tmp_path):
    (tmp_path / "videos" / "2.mp4").unlink()
    (tmp_path / "list.csv").write_text("id,caption,path\n" + "".join(f"{n},,videos/{n}.mp4\n" for n in range(3)))
    listed = replace(config, input=str(tmp_path / "list.csv"), source="csv")

    def unmount(_step, count):
        if count == 2:
            (tmp_path / "videos").rename(tmp_path / "gone")
            (tmp_path / "videos").mkdir()
        return False

    here.fails = unmount
    with pytest.raises(RuntimeError, match=r"0\.mp4: was there at the start and is gone, as other footage is"):
        curate(listed)
    (tmp_path / "videos").rmdir()
    (tmp_path / "gone").rename(tmp_path / "videos")
    here.fails = lambda _step, _count: False
    assert curate(listed) == {"accepted": 2, "missing": 1}


def test_a_network_that_fails_at_its_first_clip_is_refused_before_the_work(config, tmp_path):
    footage.write_cotracker(tmp_path / "clone")
    with (tmp_path / "clone" / "hubconf.py").open("a") as file:
        file.write("def cotracker3_online():\n    return torch.nn.Linear(2, 2)\n")
    networks = {"tracker": "cotracker", "cotracker": str(tmp_path / "clone"), "device": "cpu"}
    broken = replace(config, **networks, cotracker_model="cotracker3_online")
    with pytest.raises(
        ValueError, match=r"^annotate, on a trial of batch_size=4 clips: TypeError: .*unexpected keyword argument 'quer"
    ):
        curate(broken)
    assert not (tmp_path / "out").exists()
    Annotate(Run(replace(config, **networks), tmp_path), None).try_out()


def test_the_trial_clip_is_described_even_if_its_points_are_lost(config, tmp_path, monkeypatch):
    described = []
    monkeypatch.setattr(steps, "describe", lambda clips, _: described.extend(clips) or ["noise"] * len(clips))
    strict = replace(config, captioner="blip2", min_tracked_fraction=0.999)
    monkeypatch.setattr(steps, "build_tracker", lambda *_: Lost())
    Annotate(Run(strict, tmp_path), None).try_out()
    assert [clip.shape for clip in described] == [(8, 64, 96, 3)] * strict.batch_size
