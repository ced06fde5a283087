"""Samples from clips on disk: frames, pixels, tracks, damage, and the cache of latents."""

import io
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from clip_files import SIZE, WORLD, record, write_folder, write_shard

from imageconductor.conditioning import FlowMapConvention
from imageconductor.conditioning.flow_map import flow_map
from imageconductor.data.batches import Batches, SpriteSamples, sample_frames, scale_pixels
from imageconductor.data.clip_index import find_clips
from imageconductor.data.clip_records import CorruptClipError, encode_tracks
from imageconductor.data.clips import ClipSamples, MixedOrder, ShuffledOrder
from imageconductor.data.sprite_world import SpriteSet
from imageconductor.data.sprites import SpriteDataset
from imageconductor.models.networks import Networks
from imageconductor.sampling.preview import VideoPreview
from imageconductor.training.run import run_stage
from imageconductor.training.stage_configs import load_config
from imageconductor.training.stages.registry import find_stage
from scripts import cache_latents


def test_a_sample_is_what_was_recorded(folder):
    samples = ClipSamples([folder], SIZE, num_frames=8, seed=1)
    for position in range(5):
        sample = samples[position]
        clip = SpriteDataset(WORLD)[int(sample["key"].removeprefix("clip-"))]
        assert sample["pixel_values"].shape == (3, 8, 32, 32)
        assert sample["pixel_values"].dtype == torch.uint8
        loss = (sample["pixel_values"].float() - clip["pixel_values"].float()).abs().mean()
        assert loss < 10  # the codec's
        torch.testing.assert_close(sample["points"], clip["points"], atol=1e-5, rtol=0)
        assert torch.equal(sample["visible"], clip["visible"])
        assert sample["caption"] == clip["caption"]


def test_stored_tracks_keep_the_steps_of_slow_motion_anywhere(tmp_path):
    """float16 would move them by 0 or 0.25 px a frame where x >= 256, and by 0, 1 or 2 px where x >= 2048."""
    starts = np.array([3.0, 255.8, 380.0, 511.0, 1279.0, 4000.0, -700.0, 1e6])
    points = np.stack([starts[:, None] + 0.6 * np.arange(32), np.full((8, 32), 200.3)], axis=-1)
    folder = write_folder(tmp_path / "clips", {"a": {"tracks.npz": encode_tracks(points, np.ones((8, 32), bool))}})
    stored, visible = find_clips([folder])[0][0].tracks()
    assert visible.all()
    assert np.abs(np.diff(stored, axis=1) - [0.6, 0.0])[:-1].max() < 1e-3
    np.testing.assert_allclose(stored, points, rtol=1e-7)


def test_tracks_in_float16_of_earlier_shards_are_read(records, tmp_path):
    old, file = dict(records["clip-1"]), io.BytesIO()
    with np.load(io.BytesIO(old["tracks.npz"])) as arrays:
        points = arrays["points"].astype(np.float16)
        points[0, 3] = np.nan
        np.savez(file, points=points, visible=arrays["visible"])
        visible = arrays["visible"].copy()
    visible[0, 3] = False
    old["tracks.npz"] = file.getvalue()
    sample = ClipSamples([write_shard(tmp_path / "clips.tar", {"clip-1": old})], SIZE, 8)[0]
    expected = torch.from_numpy(points.astype(np.float32))
    torch.testing.assert_close(sample["points"], expected, atol=1e-5, rtol=0, equal_nan=True)
    assert sample["visible"].tolist() == visible.tolist()


def test_a_track_of_unknown_start_asks_for_no_motion_from_the_corner(records, tmp_path):
    clip, points = dict(records["clip-1"]), np.full((2, 8, 2), 16.0)
    points[0, 0], points[1, :, 0] = np.nan, 4 + 2 * np.arange(8)
    clip["tracks.npz"] = encode_tracks(points, np.ones((2, 8), bool))
    folder = write_folder(tmp_path / "clips", {"a": clip})
    convention = FlowMapConvention(1, normalisation="average", accumulate=True)
    for size, flip, motion in ((SIZE, 0.0, 14), ((16, 16), 0.0, 7), ((16, 16), 1.0, -7)):
        sample = ClipSamples([folder], size, 8, horizontal_flip=flip)[0]
        assert sample["points"].isnan().any(-1).nonzero().tolist() == [[0, 0]]
        assert not sample["visible"][0, 0]
        field = flow_map(sample["points"][None], sample["visible"][None], size, convention)
        assert field.sum((0, 3, 4))[0].tolist() == pytest.approx([motion * t / 7 for t in range(8)], abs=1e-4)
        assert not field[:, 1].any()


def test_frames_are_evenly_spaced_and_every_place_occurs():
    drawn = [sample_frames(32, 16, np.random.default_rng(seed)) for seed in range(200)]
    assert {frames[1] - frames[0] for frames in drawn} == {1, 2}
    assert all(len(set(np.diff(frames))) == 1 and frames[0] >= 0 and frames[-1] < 32 for frames in drawn)
    assert {frames[0] for frames in drawn if frames[1] - frames[0] == 2} == {0, 1}
    assert sample_frames(8, 8, np.random.default_rng(0)) == list(range(8))
    assert sample_frames(5, 1, np.random.default_rng(0))[0] in range(5)


def test_pixels_become_what_float32_in_the_workers_would_be(folder, tiny_model):
    levels = np.arange(256, dtype=np.uint8)
    expected = levels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(scale_pixels(torch.from_numpy(levels)).numpy(), expected)
    with pytest.raises(ValueError, match=r"uint8, got torch\.float32"):
        scale_pixels(torch.zeros(1))
    kind = find_stage("motion_controlnet")
    stage = kind(Networks.load(tiny_model), kind.Config(model=str(tiny_model)))
    for samples in (ClipSamples([folder], SIZE, 8), SpriteSamples(WORLD, [SpriteSet.MIXED])):
        batch = Batches(samples, 2)[0]
        frames = batch["pixel_values"].numpy().astype(np.float32) / np.float32(127.5) - np.float32(1)
        given = []
        hook = stage.vae.encoder.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[0]))
        stage.encode(batch, [torch.Generator().manual_seed(i) for i in range(2)])
        hook.remove()
        assert np.array_equal(given[0].unflatten(0, (2, 8)).transpose(1, 2).numpy(), frames)


def test_only_the_frames_that_are_seen_are_decoded(folder, monkeypatch):
    decoded = []
    VideoReader = pytest.importorskip("decord").VideoReader
    get_batch, get_item = VideoReader.get_batch, VideoReader.__getitem__
    monkeypatch.setattr(VideoReader, "get_batch", lambda v, i: decoded.extend(i) or get_batch(v, i))
    monkeypatch.setattr(VideoReader, "__getitem__", lambda v, i: decoded.append(i) or get_item(v, i))
    ClipSamples([folder], SIZE, num_frames=3)[0]
    assert len(decoded) == 3


def test_a_mirrored_clip_mirrors_its_tracks(records, tmp_path):
    asymmetric = write_folder(tmp_path / "clips", {"a": record(0, "a thing"), "b": record(0, "it moves left")})
    plain, mirrored = (ClipSamples([asymmetric], SIZE, 8, horizontal_flip=probability) for probability in (0.0, 1.0))
    for position in range(2):
        before, after = plain[position], mirrored[position]
        assert before["key"] == after["key"]
        if after["key"] == "b":  # A caption that tells left from right would become a lie.
            assert torch.equal(before["pixel_values"], after["pixel_values"])
            continue
        assert torch.equal(before["pixel_values"].flip(-1), after["pixel_values"])
        inside = before["visible"]
        torch.testing.assert_close(after["points"][inside][:, 0], (31 - before["points"][inside][:, 0]).clamp(min=0))
        torch.testing.assert_close(after["points"][inside][:, 1], before["points"][inside][:, 1])


def test_another_size_moves_pixels_and_points_together(folder):
    large = ClipSamples([folder], (32, 32), 8)[0]
    small = ClipSamples([folder], (16, 16), 8)[0]
    assert small["pixel_values"].shape == (3, 8, 16, 16)
    both = large["visible"] & small["visible"]
    torch.testing.assert_close(small["points"][both], (large["points"][both] + 0.5) / 2 - 0.5, atol=0.26, rtol=0)


DAMAGE = {
    "a video that is none": {"mp4": b"not a video"},
    "a video cut short": {"mp4": 300},
    "tracks that are no archive": {"tracks.npz": b"PK"},
    "no caption": {"json": b"{}"},
    "json that is none": {"json": b"{"},
    "no tracks": {"tracks.npz": None},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_clip_is_replaced_and_named(records, tmp_path, damage):
    broken = dict(records["clip-0"])
    for part, content in damage.items():
        broken[part] = broken[part][:content] if isinstance(content, int) else content
    damaged = {part: content for part, content in broken.items() if content is not None}
    mixed = {"bad": damaged, **{key: records[key] for key in ("clip-1", "clip-2")}}
    samples = ClipSamples([write_folder(tmp_path / "clips", mixed)], SIZE, 8)
    epoch = [samples[position] for position in range(3)]
    assert {sample["key"] for sample in epoch} == {"clip-1", "clip-2"}
    assert [reason.split(":")[0] for sample in epoch for reason in sample["skipped"]] == ["bad"]
    assert Batches(samples, 3)[0]["pixel_values"].shape == (3, 3, 8, 32, 32)


def test_too_few_frames_and_nothing_readable(folder):
    with pytest.raises(CorruptClipError, match="8 frames, 9 are needed"):
        ClipSamples([folder], SIZE, num_frames=9)[0]


def test_clips_with_fewer_tracks_are_filled_up_with_hidden_ones(records, tmp_path):
    few = dict(records["clip-1"])
    with np.load(io.BytesIO(few["tracks.npz"])) as arrays:
        file = io.BytesIO()
        np.savez(file, points=arrays["points"][:4], visible=arrays["visible"][:4])
    few["tracks.npz"] = file.getvalue()
    samples = ClipSamples([write_folder(tmp_path / "clips", {"few": few, "many": records["clip-0"]})], SIZE, 8)
    batch = Batches(samples, 2)[0]
    row = batch["key"].index("few")
    assert batch["points"].shape == (2, 9, 8, 2)
    assert not batch["visible"][row, 4:].any()
    assert batch["visible"][row, :4].any()


@pytest.fixture(scope="module")
def cached(folder, tiny_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("cache")
    made = {}
    for dtype in ("float32", "float16"):
        made[dtype] = output / dtype
        made[dtype].mkdir()
        (made[dtype] / ".clips-000000.host.1.partial.tar").write_text("of a killed run")
        (made[dtype] / "made_with.json").write_text('{"model": "of shards that somebody has deleted"}')
        arguments = [f"data=[{folder}]", f"output={made[dtype]}", f"model={tiny_model}", "size=[32,32]"]
        arguments += ["clips_per_shard=2", f"dtype={dtype}", "num_workers=1"]
        assert cache_latents.main(arguments) == 0
    assert cache_latents.main([f"data=[{folder}/nothing]", f"output={output / 'none'}", f"model={tiny_model}"]) == 2
    return made


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_cached_latents_train_as_clips_do(folder, cached, tiny_model, dtype, tolerance):
    files = sorted(path.name for path in cached[dtype].iterdir())
    shards = [f"clips-{number:06d}.{ending}" for number in range(3) for ending in ("index.npz", "tar")]
    assert files == [*shards, "made_with.json"]
    kind = find_stage("motion_controlnet")
    stage = kind(Networks.load(tiny_model), kind.Config(model=str(tiny_model)))
    found = {}
    for source in (folder, cached[dtype]):
        samples = ClipSamples([source], SIZE, num_frames=8)
        for position in range(5):
            batch = Batches(samples, 1)[position]
            x_0, condition = stage.encode(batch, [torch.Generator().manual_seed(int(batch["key"][0][-1]))])
            found.setdefault(batch["key"][0], []).append((x_0, *vars(condition).values()))
    assert len(found) == 5
    for clip, cache in found.values():
        for a, b in zip(clip, cache, strict=True):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_options_that_a_cache_cannot_serve_are_errors(folder, cached):
    with pytest.raises(ValueError, match="horizontal_flip=0"):
        ClipSamples([cached["float16"]], SIZE, 8, horizontal_flip=0.5)
    with pytest.raises(ValueError, match="mix videos and cached"):
        ClipSamples([cached["float16"], folder], SIZE, 8)


def small(folder, tiny_model, output, *more):
    """What a shipped YAML needs changed for five small clips."""
    return [
        f"model={tiny_model}",
        f"data=[{folder}]",
        f"output={output}",
        "size=[32,32]",
        "num_frames=4",
        "max_steps=2",
        "mixed_precision=no",
        "motion_controlnet=null",
        "held_out_clips=2",
        "batch_size=1",
        "gradient_accumulation_steps=1",
        "preview_every=2",
        "preview_steps=1",
        "num_workers=0",
        *more,
    ]


@pytest.mark.parametrize("name", ["motion_controlnet_dense", "camera_lora", "object_lora"])
def test_the_papers_settings_train_on_curated_clips(name, folder, tiny_model, tmp_path):
    more = ["lora_rank=2"] if name.endswith("_lora") else []
    more += [f"camera_lora={tiny_model}/camera_lora"] if name == "object_lora" else []
    config = load_config(Path(f"configs/train/{name}.yaml"), small(folder, tiny_model, tmp_path, *more))
    assert run_stage(config, VideoPreview).step == 2
    assert (tmp_path / "previews" / "step-00000002.png").is_file()


@pytest.mark.slow
def test_previews_of_a_cache_show_its_clips(folder, cached, tiny_model, tmp_path):
    for name, source in (("clips", folder), ("cache", cached["float32"])):
        overrides = small(source, tiny_model, tmp_path / name, "horizontal_flip=0", "lora_rank=2")
        run_stage(load_config(Path("configs/train/camera_lora.yaml"), overrides), VideoPreview)
    videos = [iio.imread(tmp_path / name / "previews" / "step-00000002-0.mp4") for name in ("clips", "cache")]
    made = [video[:, :, video.shape[2] // 2 :].astype(float) for video in videos]
    assert np.abs(made[0] - made[1]).mean() < 25, "from the same first frame, decoded"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("camera_lora", "data=[nowhere]", "no clips at nowhere"),
        ("camera_lora", "held_out_clips=9", "less than the 5 clips"),
        ("camera_lora", "size=[33,32]", "must be multiples of 2, got 33 x 32"),
        ("camera_lora", "num_frames=99", "num_frames must be 1.."),
        ("camera_lora", "motion_controlnet=nowhere", "no motion ControlNet at nowhere"),
        ("object_lora", "camera_lora=nowhere", "no camera LoRA at nowhere"),
        ("object_lora", "camera_lora=null", "lora_rank is 64, that of the camera LoRA at .* is 2, and Eq. 4"),
    ],
)
def test_what_does_not_fit_is_told_before_weights_are_read(
    name, change, said, folder, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(Networks, "load", lambda *_: pytest.fail("weights were read"))
    overrides = [*small(folder, tiny_model, tmp_path / "run"), change]
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        run_stage(load_config(Path(f"configs/train/{name}.yaml"), overrides), VideoPreview)
    assert not (tmp_path / "run").exists()


def test_sources_are_mixed_by_weight_and_each_of_their_clips_comes_equally_often():
    large, small = ShuffledOrder([40, 60], 2, 0), ShuffledOrder([10], 2, 0)
    order = MixedOrder([large, small], [3, 1], seed=0)
    drawn = np.array([order[position] for position in range(4000)])
    assert (drawn < 100).sum() == 3000
    assert ((drawn[:1000] < 100).sum(), (drawn[1000:2000] < 100).sum()) == (750, 750)
    assert np.bincount(drawn[drawn < 100]).tolist() == [30] * 100
    assert np.bincount(drawn[drawn >= 100] - 100).tolist() == [100] * 10
    assert abs((drawn[:100] < 100).sum() - 75) < 20  # well mixed, not one source after the other
    assert [order[position] for position in (3999, 17, 2500)] == drawn[[3999, 17, 2500]].tolist()
    with pytest.raises(ValueError, match="a thousand times"):
        MixedOrder([large, small], [10_000, 1], seed=0)


def test_weighted_sources_leave_the_held_out_clips_out(tmp_path):
    for name, first, count in (("many", 0, 6), ("few", 6, 3)):
        write_folder(tmp_path / name, {f"clip-{i}": record(i) for i in range(first, first + count)})
    weights = {str(tmp_path / "many"): 1, str(tmp_path / "few"): 3}
    held_out = ClipSamples(weights, SIZE, 8, held_out_clips=3, shows_held_out=True)
    hidden = {held_out[position]["key"] for position in range(3)}
    samples = ClipSamples(weights, SIZE, 8, held_out_clips=3)
    keys = [samples.records[samples.order[position]].key for position in range(1000)]
    assert not hidden & set(keys)
    assert len(set(keys)) == 6
    assert sum(int(key.removeprefix("clip-")) >= 6 for key in keys) == 750


@pytest.mark.parametrize("data", ["data/a", ["a", 3], {"a": 0}, {"a": "much"}, {"a": True}, {"a": float("inf")}])
def test_data_are_paths_or_positive_weights_by_path(data):
    with pytest.raises(ValueError, match="data must be paths, "):
        find_stage("camera_lora").Config(data=data)


def test_weights_are_read_from_the_command_line():
    path = Path("configs/train/sprites/camera_lora.yaml")
    assert load_config(path, ["data={a/b.c: 3, d: 0.5}"]).data == {"a/b.c": 3, "d": 0.5}
    assert load_config(path, ["data=[a/b.c,d]"]).data == ["a/b.c", "d"]
    with pytest.raises(ValueError, match="data must be paths"):
        load_config(path, ["data=data/mixed"])
