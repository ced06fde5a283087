"""Clips that hang or end their process, and the motion score."""

import contextlib
import errno
import importlib
import math
import os
import threading
import time

import footage
import numpy as np
import psutil
import pytest

from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.executors import Workers
from imageconductor.curation.motion_score import motion_scores, motion_threshold

FAULTY = """
import os, signal, time

def die_once(marker):
    if not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"

def divide(items, log):
    with open(log, "a") as file:
        print(len(items), file=file)
    if "kills" in items:
        os._exit(3)
    return [10 / item for item in items]

def lose_gpu(items):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def fill_gpu(items):
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")

def refuse(items):
    raise RuntimeError(items[0])

def sleep(items):
    time.sleep(1.3)
    return items

def hang(log):
    with open(log, "a") as file:
        print("begun", file=file)
    time.sleep(60)

def lose_disk(number):
    raise OSError(number, os.strerror(number), "a.mp4")
"""


@pytest.fixture(scope="module")
def faulty(importable):
    """A module, which worker processes can import, of functions that fail."""
    return importable("faulty", FAULTY)


@pytest.fixture(scope="module")
def patient_worker(faulty):
    with Workers(1, limit_s=20.0) as workers:
        yield workers


@pytest.fixture(scope="module")
def hasty_worker(faulty):
    with Workers(1, limit_s=1.0) as workers:
        yield workers


def test_a_clip_that_hangs_or_dies_is_named_and_the_next_one_is_done(hasty_worker):
    assert list(hasty_worker.map(math.sqrt, [(4.0,)])) == [2.0]
    assert [f.reason for f in hasty_worker.map(time.sleep, [(60.0,)])] == ["time limit"]
    assert [f.reason for f in hasty_worker.map(os._exit, [(3,)])] == ["crashed"]
    wrong, root = hasty_worker.map(math.sqrt, [(-1.0,), (9.0,)])
    assert (wrong.reason, root) == ("failed", 3.0)
    assert wrong.detail.startswith("ValueError: ")


def test_a_clip_that_took_too_long_is_not_tried_again(hasty_worker, faulty, tmp_path):
    assert [f.reason for f in hasty_worker.map(faulty.hang, [(str(tmp_path / "log"),)])] == ["time limit"]
    assert (tmp_path / "log").read_text() == "begun\n"


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EMFILE"])
def test_storage_that_fails_is_no_fault_of_a_clip(name, patient_worker, faulty):
    with pytest.raises(RuntimeError, match=r"a\.mp4"):
        list(patient_worker.map(faulty.lose_disk, [(getattr(errno, name),)]))
    assert [f.reason for f in patient_worker.map(faulty.lose_disk, [(errno.EISDIR,)])] == ["failed"]


def test_a_batch_has_the_time_of_its_clips(hasty_worker, faulty):
    assert list(hasty_worker.map_batches(faulty.sleep, [1, 2], size=2)) == [1, 2]
    assert [r.reason for r in hasty_worker.map_batches(faulty.sleep, [1], size=1)] == ["time limit"]


def test_a_killed_process_costs_no_clip(patient_worker, faulty, tmp_path):
    markers = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert list(patient_worker.map(faulty.die_once, [(marker,) for marker in markers])) == ["done", "done"]


def test_one_bad_clip_costs_its_batch_no_other(patient_worker, faulty, tmp_path, caplog):
    log = tmp_path / "log"
    items = [1, 2, 0, 5, 10, "kills", 20]
    results = list(patient_worker.map_batches(faulty.divide, items, str(log), size=3))
    assert [results[i] for i in (0, 1, 3, 4, 6)] == [10, 5, 2, 1, 0.5]
    assert (results[2].reason, results[5].reason) == ("failed", "crashed")
    assert log.read_text().split().count("3") == 2, "the last batch has one"
    [told] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith("batches that fail are done again clip by clip; the first: ZeroDivisionError")


def test_a_gpu_that_is_lost_or_full_is_no_fault_of_a_clip(patient_worker, faulty):
    with pytest.raises(RuntimeError, match=r"illegal memory access was encountered$"):
        list(patient_worker.map_batches(faulty.lose_gpu, [1, 2, 3], size=1))
    with pytest.raises(RuntimeError, match=r"a smaller batch_size or raft_batch needs less$"):
        list(patient_worker.map_batches(faulty.fill_gpu, [1], size=1))


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [
        (
            "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input",
            False,
        ),
        ("cuDNN error: CUDNN_STATUS_BAD_PARAM", False),
        ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx( handle, opa, opb)`", False),
        ("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm( handle, opa, opb)`", False),
        ("CUDA error: invalid configuration argument\nCUDA kernel errors might be asynchronously reported", False),
        ("CUDA error: invalid argument", False),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", True),
        ("CUDA error: unspecified launch failure", True),
        ("CUDA error: no kernel image is available for execution on the device", True),
    ],
)
def test_what_a_gpu_refuses_of_one_clip_costs_no_other(message, is_lost, patient_worker, faulty):
    results = patient_worker.map(faulty.refuse, [([message],)])
    if is_lost:
        with pytest.raises(RuntimeError, match=message):
            list(results)
    else:
        assert [result.reason for result in results] == ["failed"]


def test_a_missing_module_is_no_fault_of_a_clip(patient_worker):
    with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
        list(patient_worker.map(importlib.import_module, [("no_such_module",)]))


def test_processes_killed_as_they_start_are_replaced():
    results, killed = [], []
    others = psutil.Process().children()
    with Workers(1, limit_s=20.0) as workers:
        worker = threading.Thread(target=lambda: results.extend(workers.map(math.sqrt, [(4.0,), (9.0,), (16.0,)])))
        worker.start()
        while worker.is_alive() and not killed:
            for process in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process not in others and "spawn_main" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process)
        worker.join()
    assert killed
    assert results == [2.0, 3.0, 4.0]


def test_the_dropped_fraction_is_exact_and_among_equal_scores_the_key_decides():
    scores = {f"{n:02d}": float(n % 5) for n in range(20)}
    arrays = np.array(list(scores.values())), np.array(list(scores), "S16")
    limit = motion_threshold(*arrays, 0.25)
    assert sorted(key for key, score in scores.items() if (score, key) <= limit) == ["00", "01", "05", "10", "15"]
    assert motion_threshold(*arrays, 0.0) is None
    assert motion_threshold(arrays[0][:3], arrays[1][:3], 0.25) is None


def test_the_motion_score_of_a_shift():
    clip = footage.pan(0, 6, (3.0, 4.0))
    assert motion_scores([clip], CurateConfig("", ""))[0] == pytest.approx(5 * np.sqrt(192 * 128), rel=0.05)
