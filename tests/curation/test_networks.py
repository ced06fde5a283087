"""Adapters of external networks: RAFT, CoTracker and BLIP-2, with random weights in the layout of the real files."""

import json
import sys
from types import ModuleType

import footage
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from imageconductor.curation import captions, curate, motion_score
from imageconductor.curation.captions import describe, load_blip2
from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.motion_score import motion_scores
from imageconductor.curation.passes import Annotate
from imageconductor.curation.run_folder import Run
from imageconductor.data.trackers import CoTracker


@pytest.fixture(autouse=True)
def no_network_is_kept():
    yield
    motion_score.load_raft.cache_clear()
    captions.load_blip2.cache_clear()


@pytest.mark.slow
def test_raft_of_torchvision_scores_pairs_alike_in_any_batch(tmp_path):
    flow = pytest.importorskip("torchvision.models.optical_flow", exc_type=(ImportError, RuntimeError))
    torch.manual_seed(0)
    network = flow.raft_large()
    assert any(name.endswith("num_batches_tracked") for name in network.state_dict())
    torch.save(network.state_dict(), tmp_path / "raft.pth")
    clip = footage.pan(0, 3, (1, 0), size=(136, 128))
    scores = {}
    for batch in (1, 2):
        places = {"raft_weights": str(tmp_path / "raft.pth"), "raft_batch": batch}
        config = CurateConfig("", "", size=(136, 128), flow="raft", device="cpu", **places)
        scores[batch] = motion_scores([clip, clip[::-1]], config)
    assert np.isfinite(scores[1]).all()
    assert scores[1] == pytest.approx(scores[2], rel=1e-4)
    assert scores[1][0] != pytest.approx(scores[1][1], rel=1e-4)
    for content in (nn.Linear(2, 2).state_dict(), network):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="not torchvision's raft_large"):
            motion_score.load_raft(str(tmp_path / "other.pth"), "cpu")


def test_raft_is_called_on_adjacent_frames(monkeypatch, tmp_path):
    """torchvision does not install beside a CPU build of torch, so a network with the same interface replaces RAFT."""
    calls = []

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))
            self.norm = nn.BatchNorm2d(3)

        def forward(self, before, after):
            assert before.shape[1:] == (3, 128, 192)
            assert before.dtype == after.dtype == self.scale.dtype
            assert before.device == after.device == self.scale.device
            assert -1 <= before.min() <= after.max() <= 1
            calls.append(len(before))
            is_black = (self.norm(before) + self.norm(after)).flatten(1).max(1).values < -1.999
            flow = torch.stack([self.scale * 3, self.scale * 4]).reshape(1, 2, 1, 1) * (1 + is_black.view(-1, 1, 1, 1))
            return [None, flow.expand(len(before), 2, 128, 192)]

    weights = Shift()
    weights.scale.data.fill_(1)
    torch.save(weights.state_dict(), tmp_path / "raft.pth")
    module = ModuleType("torchvision.models.optical_flow")
    module.raft_large = Shift
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", ModuleType("torchvision.models"))
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", module)
    config = CurateConfig("", "", flow="raft", raft_weights=str(tmp_path / "raft.pth"), device="cpu")
    clip = footage.pan(0, 20, (1, 0))
    scores = motion_scores([clip, 0 * clip, clip[:6]], config)
    assert scores == pytest.approx([size * np.sqrt(192 * 128) for size in (5, 10, 5)])
    assert calls == [8, 8, 8, 8, 8, 3], "pairs of all clips, eight at a time"


@pytest.mark.parametrize("size", [(384, 120), (100, 256)])
def test_sizes_that_raft_cannot_take_are_refused(size):
    with pytest.raises(ValueError, match=r"flow=raft needs sides in multiples of 8 from 128 on, got"):
        CurateConfig("", "", size=size, flow="raft", raft_weights="raft.pth")
    CurateConfig("", "", size=size)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cotracker_from_a_local_clone(dtype, tmp_path):
    footage.write_cotracker(tmp_path / "clone", dtype)
    tracker = CoTracker(str(tmp_path / "clone"), device="cpu")
    points, visible = tracker.track(np.zeros((4, 32, 48, 3), np.uint8), np.array([[5.0, 6.0], [28.0, 9.0]]))
    assert points.shape == (2, 4, 2)
    assert points[0, 3].tolist() == [8.0, 9.0]
    assert visible.tolist() == [[True] * 4, [True, True, False, False]]
    assert tracker.name == "cotracker3_offline"
    assert tracker.version.startswith("clone ")
    clips = [np.full((4, 32, 48, 3), value, np.uint8) for value in (0, 2)]
    found = [tracker.track(clip, np.array([[5.0, 6.0]]))[0] for clip in clips]
    assert [points[0, 3].tolist() for points in found] == [[8.0, 9.0], [10.0, 11.0]]
    with pytest.raises(ValueError, match="CoTracker cannot be loaded from"):
        CoTracker(str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used"):
        CoTracker(str(tmp_path / "clone"), device="cuda:99")


@pytest.fixture(params=["opt", "t5"])
def blip2(request, tmp_path):
    """Folder of a BLIP-2 with a few thousand random weights, in shards, whose tokens are bytes."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    words = {word: number for number, word in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    text = Tokenizer(BPE(words, []))
    text.pre_tokenizer, text.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    small = {"vocab_size": len(tokenizer), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    language = {
        "opt": OPTConfig(
            **small, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2
        ),
        "t5": T5Config(
            **small, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
            decoder_start_token_id=1,
        ),
    }[request.param]  # fmt: skip
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        qformer_config={**sizes, "encoder_hidden_size": 16, "cross_attention_frequency": 1},
        text_config=language.to_dict(),
        num_query_tokens=4,
        image_text_hidden_size=8,
        image_token_index=len(tokenizer) - 1,
    )
    torch.manual_seed(0)
    network = Blip2ForConditionalGeneration(config)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.3)
    network.save_pretrained(tmp_path, max_shard_size="20KB")
    processor = Blip2Processor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4)
    processor.save_pretrained(tmp_path)
    # Published folders have the settings of the pictures in a file of their own.
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings.pop("image_processor")))
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blip2_describes_frames_and_equal_descriptions_appear_once(blip2, dtype, monkeypatch):
    monkeypatch.setattr(captions, "_choose_dtype", lambda _: dtype)
    _, network, _ = load_blip2(str(blip2), "cpu")
    assert network.vision_model.dtype == network.language_model.dtype == dtype
    clip = np.random.default_rng(0).integers(0, 255, (33, 64, 96, 3), np.uint8)
    [one] = describe([clip], CurateConfig("", "", blip2=str(blip2), caption_frames=1, device="cpu"))
    assert one
    assert "<" not in one
    same = np.repeat(clip[16:17], 33, axis=0)
    three = CurateConfig("", "", blip2=str(blip2), caption_frames=3, device="cpu")
    assert describe([same, clip], three) == [one, *describe([clip], three)]
    assert describe([], three) == []


def test_a_device_that_is_not_there_is_named(blip2):
    with pytest.raises(ValueError, match=r"^device 'cuda:99' cannot be used: "):
        load_blip2(str(blip2), "cuda:99")


def test_a_blip2_that_lacks_weights_is_refused(blip2):
    settings = json.loads((blip2 / "config.json").read_text())
    settings["qformer_config"]["num_hidden_layers"] = 2
    (blip2 / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"^BLIP-2 cannot be loaded from .*: it lacks \d+ weights, such as qformer\."):
        load_blip2(str(blip2), "cpu")


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"captioner": "blip2"}, ["BLIP-2 with OPT carries OPT's non-commercial licence"]),
        ({"captioner": "blip2", "blip2": "/opt/optimal-blip2-flan-t5-xl"}, []),
        ({}, []),
        ({"tracker": "cotracker"}, ["CoTracker's weights are CC-BY-NC"]),
    ],
)
def test_networks_under_a_non_commercial_licence_are_warned_of_once(settings, warned, tmp_path, monkeypatch, caplog):
    class NoWorkers:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, *_):
            return []

    monkeypatch.setattr(curate, "Workers", NoWorkers)
    curate._check_models(Run(CurateConfig("", "", **settings), tmp_path))
    assert len(caplog.messages) == len(warned)
    assert all(map(str.startswith, caplog.messages, warned))


def test_blip2_is_loaded_before_the_work_begins(tmp_path):
    annotate = Annotate(Run(CurateConfig("", "", captioner="blip2", blip2=str(tmp_path)), tmp_path), None)
    assert annotate.uses_networks
    with pytest.raises(ValueError, match=r"^BLIP-2 cannot be loaded from .*[^\n]$"):
        annotate.prepare()
