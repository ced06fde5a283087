"""Which GPU each process of a pass with networks works on, with GPUs that do not exist."""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from imageconductor.curation import executors
from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.executors import Workers

MODULE = """
import os, time
from pathlib import Path

def name_gpu(items):
    time.sleep(0.4)  # Until every process of the pool has started.
    return [(os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")) for _ in items]

class NameGpus:
    # A pass whose clips leave the process that they were worked on by, and the GPUs that it sees.
    uses_networks = True

    def __init__(self, config, folder, together=1):
        self.config, self.folder, self.together = config, folder, together

    def prepare(self):
        pass

    def work(self, chunk, workers, tick):
        # No chunk is done before so many have begun, each of them in a process of its own.
        (self.folder / f"begun-{chunk}").touch()
        while len(list(self.folder.glob("begun-*"))) < self.together:
            time.sleep(0.05)
        for pid, gpus in workers.map_batches(name_gpu, range(2), size=1):
            (self.folder / f"{chunk}-{pid}").write_text(str(gpus))
            tick("done")
"""


@pytest.fixture(scope="module")
def naming(importable):
    """A module, which worker processes can import, that names GPUs."""
    return importable("naming", MODULE)


@pytest.fixture
def eight_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture(scope="module")
def cluster_of_eight_gpus(naming):
    ray = pytest.importorskip("ray")
    path = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, num_gpus=8, include_dashboard=False, log_to_driver=False, runtime_env=path)
    yield ray
    ray.shutdown()


def test_worker_i_sees_gpu_i_alone_and_its_replacement_does_so_too(naming):
    with Workers(3, limit_s=30.0, gpus=["4", "GPU-a"]) as workers:
        before = dict(workers.map_batches(naming.name_gpu, range(6), size=1))
        assert sorted(before.values()) == ["4", "4", "GPU-a"]
        assert [f.reason for f in workers.map(os._exit, [(3,)])] == ["crashed"]
        after = dict(workers.map_batches(naming.name_gpu, range(6), size=1))
    assert sorted(after.values()) == ["4", "4", "GPU-a"]
    assert before.keys() != after.keys()


@pytest.mark.parametrize(
    ("settings", "count", "gpus"),
    [
        ({}, 8, list("01234567")),
        ({"gpus_per_worker": 0.25}, 32, list("01234567")),
        ({"gpus_per_worker": 0.3, "device": "cuda"}, 24, list("01234567")),
        ({"gpu_workers": 5}, 5, list("01234567")),
        ({"device": "cuda:6", "gpus_per_worker": 0.5}, 2, []),
        ({"device": "cpu"}, 1, []),
    ],
)
def test_passes_with_and_without_networks_have_their_own_numbers_of_workers(
    settings, count, gpus, eight_gpus, monkeypatch
):
    made = []

    class Recorded(Workers):
        def __init__(self, count, limit_s, *_, gpus=()):
            made.append((count, list(gpus)))
            super().__init__(count, limit_s)

    monkeypatch.setattr(executors, "Workers", Recorded)
    config = CurateConfig("", "", workers=3, **settings)
    for uses_networks in (True, False):
        executors.run(SimpleNamespace(config=config, uses_networks=uses_networks, prepare=None, work=print), [], print)
    assert made == [(count, gpus), (3, [])]


def test_the_local_executor_works_on_the_gpus_that_the_command_sees(naming, eight_gpus, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,2,3,1,0,5,7,4")
    config = CurateConfig("", "", gpu_workers=3, workers=1, clips_per_shard=2, batch_size=1)
    executors.run(naming.NameGpus(config, tmp_path), range(3), print)
    assert {path.read_text() for path in tmp_path.glob("[0-9]*")} == {"6", "2", "3"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "num_chunks", "count", "share"),
    [
        ({"gpus_per_worker": 0.25}, 40, 32, 0.25),
        ({"gpus_per_worker": 0.5}, 40, 16, 0.5),
        ({}, 40, 8, 1.0),
        ({"gpus_per_worker": 0.25}, 8, 8, 1.0),
        ({"gpu_workers": 16}, 40, 16, 0.5),
    ],
)
def test_ray_has_actors_for_every_gpu(settings, num_chunks, count, share, cluster_of_eight_gpus):
    config = CurateConfig("", "", executor="ray", workers=2, **settings)
    assert executors._plan_actors(config, num_chunks) == (count, {"num_cpus": 0, "num_gpus": share})
    on_cpu = replace(config, device="cpu", gpu_workers=3)
    assert executors._plan_actors(on_cpu, num_chunks) == (2, {"num_cpus": 1})


@pytest.mark.slow
def test_actors_of_ray_use_every_gpu(cluster_of_eight_gpus, naming, tmp_path):
    config = CurateConfig("", "", executor="ray", gpus_per_worker=0.5, workers=1)
    executors.run(naming.NameGpus(config, tmp_path, together=8), range(8), print)
    assert {path.read_text() for path in tmp_path.glob("[0-9]*")} == set("01234567")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpus_per_worker": 0.0}, r"gpus_per_worker must lie in \(0, 1\], got 0.0; .* none with device=cpu"),
        ({"gpus_per_worker": 2.0}, r"got 2.0; a process uses one GPU at most"),
        ({"executor": "ray", "device": "cuda:1"}, "device=cuda:1: Ray assigns the GPUs; .* set device=cuda, or none"),
        ({"gpu_workers": -1}, "gpu_workers must not be negative, got -1"),
    ],
)
def test_gpus_that_cannot_be_shared_so_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        CurateConfig("", "", **settings)
