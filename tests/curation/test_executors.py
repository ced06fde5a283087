"""Clips that hang or end their process, the motion score, and external models."""

import contextlib
import importlib
import math
import os
import sys
import threading
import time
from types import ModuleType

import footage
import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from imageconductor.curation import motion_score
from imageconductor.curation.captions import describe
from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.executors import Workers
from imageconductor.curation.motion_score import motion_scores, motion_threshold
from imageconductor.data.trackers import CoTracker

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

def sleep(items):
    time.sleep(1.3)
    return items
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A module, which worker processes can import, of functions that fail."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty.py").write_text(FAULTY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("faulty")


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


def test_a_batch_has_the_time_of_its_clips(hasty_worker, faulty):
    assert list(hasty_worker.map_batches(faulty.sleep, [1, 2], size=2)) == [1, 2]
    assert [r.reason for r in hasty_worker.map_batches(faulty.sleep, [1], size=1)] == ["time limit"]


def test_a_killed_process_costs_no_clip(patient_worker, faulty, tmp_path):
    markers = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert list(patient_worker.map(faulty.die_once, [(marker,) for marker in markers])) == ["done", "done"]


def test_one_bad_clip_costs_its_batch_no_other(patient_worker, faulty, tmp_path):
    log = tmp_path / "log"
    items = [1, 2, 0, 5, 10, "kills", 20]
    results = list(patient_worker.map_batches(faulty.divide, items, str(log), size=3))
    assert [results[i] for i in (0, 1, 3, 4, 6)] == [10, 5, 2, 1, 0.5]
    assert (results[2].reason, results[5].reason) == ("failed", "crashed")
    assert log.read_text().split().count("3") == 2, "the last batch has one"


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


def test_raft_is_called_on_adjacent_frames(monkeypatch, tmp_path):
    """torchvision does not install beside a CPU build of torch, so a network with the same interface replaces RAFT."""

    calls = []

    class Shift(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.zeros(()))

        def forward(self, before, after):
            assert before.shape[1:] == (3, 128, 192)
            assert -1 <= before.min() <= after.max() <= 1
            calls.append(len(before))
            is_black = (before + after).flatten(1).max(1).values == -2
            flow = torch.stack([self.scale * 3, self.scale * 4]).reshape(1, 2, 1, 1) * (1 + is_black.view(-1, 1, 1, 1))
            return [None, flow.expand(len(before), 2, 128, 192)]

    torch.save({"scale": torch.ones(())}, tmp_path / "raft.pth")
    module = ModuleType("torchvision.models.optical_flow")
    module.raft_large = Shift
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", ModuleType("torchvision.models"))
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", module)
    motion_score.load_raft.cache_clear()
    config = CurateConfig("", "", flow="raft", raft_weights=str(tmp_path / "raft.pth"), device="cpu")
    clip = footage.pan(0, 20, (1, 0))
    scores = motion_scores([clip, 0 * clip, clip[:6]], config)
    motion_score.load_raft.cache_clear()
    assert scores == pytest.approx([size * np.sqrt(192 * 128) for size in (5, 10, 5)])
    assert calls == [8, 8, 8, 8, 8, 3], "pairs of all clips, eight at a time"


def test_cotracker_from_a_local_clone(tmp_path):
    footage.write_cotracker(tmp_path / "clone")
    tracker = CoTracker(str(tmp_path / "clone"), device="cpu")
    points, visible = tracker.track(np.zeros((4, 32, 48, 3), np.uint8), np.array([[5.0, 6.0], [28.0, 9.0]]))
    assert points.shape == (2, 4, 2)
    assert points[0, 3].tolist() == [8.0, 9.0]
    assert visible.tolist() == [[True] * 4, [True, True, False, False]]
    assert tracker.name == "cotracker3_offline"
    assert tracker.version.startswith("clone ")
    clips = [np.full((4, 32, 48, 3), value, np.uint8) for value in (0, 2)]
    together = tracker.track_together(clips, np.array([[5.0, 6.0]]))
    assert [found[0][0, 3].tolist() for found in together] == [[8.0, 9.0], [10.0, 11.0]]
    for clip, (points, visible) in zip(clips, together, strict=True):
        alone = tracker.track(clip, np.array([[5.0, 6.0]]))
        assert (alone[0] == points).all()
        assert (alone[1] == visible).all()
    with pytest.raises(ValueError, match="CoTracker cannot be loaded from"):
        CoTracker(str(tmp_path), device="cpu")


@pytest.fixture
def blip2(tmp_path):
    """Folder of a BLIP-2 with a few thousand random weights and a vocabulary of five words."""
    words = {
        word: number
        for number, word in enumerate(["<pad>", "</s>", "<s>", "<unk>", "<image>", "a", "dog", "cat", "runs", "grass"])
    }
    text = Tokenizer(WordLevel(words, unk_token="<unk>"))
    text.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = OPTConfig(
        vocab_size=len(words), hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    config = Blip2Config(
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        qformer_config={**sizes, "encoder_hidden_size": 16, "cross_attention_frequency": 1},
        text_config=language.to_dict(),
        num_query_tokens=4,
        image_text_hidden_size=8,
        image_token_index=4,
    )
    torch.manual_seed(0)
    network = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        network.get_input_embeddings().weight[:5] = 0
    network.save_pretrained(tmp_path)
    processor = Blip2Processor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4)
    processor.save_pretrained(tmp_path)
    return tmp_path


def test_blip2_describes_frames_and_equal_descriptions_appear_once(blip2):
    clip = np.random.default_rng(0).integers(0, 255, (33, 64, 96, 3), np.uint8)
    [one] = describe([clip], CurateConfig("", "", blip2=str(blip2), caption_frames=1, device="cpu"))
    assert set(one.split()) <= {"a", "dog", "cat", "runs", "grass"}
    assert one
    same = np.repeat(clip[16:17], 33, axis=0)
    three = CurateConfig("", "", blip2=str(blip2), caption_frames=3, device="cpu")
    assert describe([same, clip], three) == [one, *describe([clip], three)]
    assert describe([], three) == []
