"""Shards and folders, their indices, the clips that are held out, and the order of reading."""

import hashlib
import json
import os
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from clip_files import SIZE, write_shard

from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.run_folder import Run
from imageconductor.data import clip_index
from imageconductor.data.clip_index import ClipList, find_clips, index_path, write_index
from imageconductor.data.clip_records import CorruptClipError
from imageconductor.data.clips import ClipSamples, ShuffledOrder, hold_out


def test_shards_and_a_folder_hold_the_same(folder, records, tmp_path):
    items = list(records.items())
    for number, part in enumerate((items[:2], items[2:4], items[4:])):
        write_shard(tmp_path / f"clips-{number:03d}.tar", dict(part))
    for source in (tmp_path, f"{tmp_path}/clips-{{000..002}}.tar", f"{tmp_path}/clips-*.tar"):
        shards = find_clips([source])
        assert [len(shard) for shard in shards] == [2, 2, 1]
        for found in (record for shard in shards for record in shard):
            for extension, content in records[found.key].items():
                assert found.read(extension) == content
    (plain,) = find_clips([folder])
    assert plain.sizes == [1] * 5
    for found in plain:
        assert {part: found.read(part) for part in found.parts} == records[found.key]


def test_a_folder_of_links_holds_what_they_lead_to(folder, tmp_path):
    (tmp_path / "gathered" / "first").mkdir(parents=True)
    (tmp_path / "gathered" / "second").symlink_to(folder, target_is_directory=True)
    (tmp_path / "gathered" / "first" / "round").symlink_to(tmp_path / "gathered", target_is_directory=True)
    (tmp_path / "gathered" / "third").symlink_to("second", target_is_directory=True)  # its clips are there
    (tmp_path / "gathered" / "up").symlink_to("..", target_is_directory=True)
    (tmp_path / "gathered" / "itself").symlink_to("itself")
    [plain], [linked] = find_clips([folder]), find_clips([tmp_path / "gathered"])
    assert [clip.key for clip in linked] == [f"second/{clip.key}" for clip in plain]
    assert linked[0].read("json") == plain[0].read("json")


def test_a_folder_that_may_not_be_read_is_left_out(folder, tmp_path, monkeypatch, caplog):
    """As `lost+found` at the root of a disk."""
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "lost+found").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    [found] = find_clips([tmp_path / "data"])
    assert len(found) == 5
    assert "lost+found cannot be read, and is left out" in caplog.text


def test_an_index_is_read_instead_of_the_headers(records, tmp_path, monkeypatch):
    named = {"sub/ünï": records["clip-0"], "b" * 150: {"json": b"{}"}, "c": {"mp4": b"v", "tracks.npz": b"t"}}
    shard = write_shard(tmp_path / "clips.v1.tar", named)
    write_index(shard)
    assert index_path(shard).name == "clips.v1.index.npz"
    monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("the headers were read"))
    (found,) = find_clips([tmp_path])
    assert {clip.key: {part: clip.read(part) for part in clip.parts} for clip in found} == named
    assert found.sizes == [3]
    with pytest.raises(CorruptClipError, match=r"no c\.json"):
        found[2].read("json")
    clips = ClipList([found, found])
    assert [clips[number].key for number in range(len(clips))] == [*named] * 2
    with pytest.raises(IndexError):
        clips[6]


def test_an_index_of_another_shard_is_not_believed(records, tmp_path):
    shard = write_shard(tmp_path / "clips.tar", {"a": records["clip-0"]})
    for stale in (b"", b"no archive", None):
        if stale is not None:
            index_path(shard).write_bytes(stale)
        assert [clip.key for clip in find_clips([shard])[0]] == ["a"]
        before = index_path(shard).read_bytes()
    write_shard(shard, {"a": records["clip-0"], "b": records["clip-1"]})
    assert [clip.key for clip in find_clips([shard])[0]] == ["a", "b"]
    assert index_path(shard).read_bytes() != before
    write_shard(shard, {"c": {"json": b"1" * 100}})
    find_clips([shard])
    write_shard(shard, {"c": {"json": b"2" * 99}})  # tar fills up to full blocks: the sizes of the shards are equal
    assert shard.stat().st_size == np.load(index_path(shard))["shard_bytes"]
    with pytest.raises(CorruptClipError, match=r"clips\.tar: has changed since its \.index\.npz was written; delete"):
        find_clips([shard])[0][0].read("json")


def test_one_process_writes_what_is_missing_while_others_wait(records, tmp_path, monkeypatch):
    for number in range(3):
        write_shard(tmp_path / f"clips-{number}.tar", {f"{number}": records["clip-0"]})
    write, written = write_index, []

    def slow(path):
        written.append(path.name)
        time.sleep(0.1)
        return write(path)

    monkeypatch.setattr(clip_index, "write_index", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: [clip.key for clip in ClipList(find_clips([tmp_path]))], range(4)))
    assert found == [["0", "1", "2"]] * 4
    assert sorted(written) == [f"clips-{number}.tar" for number in range(3)]


def test_shards_that_cannot_be_written_beside_are_read(records, tmp_path, monkeypatch, caplog):
    shard = write_shard(tmp_path / "clips.tar", records)

    def refuse(_):
        raise PermissionError("read-only")

    monkeypatch.setattr(clip_index, "atomic_write", refuse)
    assert len(find_clips([shard])[0]) == len(records)
    assert "every process reads the shard's headers" in caplog.text


def test_a_clip_takes_less_than_a_hundred_bytes(tmp_path):
    shard = write_shard(
        tmp_path / "clips.tar", {f"{i:016x}": {"mp4": b"", "tracks.npz": b"", "json": b""} for i in range(100)}
    )
    (found,) = find_clips([shard])
    assert found.clips.nbytes == 100 * (16 + 3 * 16)


def test_a_shard_that_a_killed_process_left_unfinished_is_not_read(records, tmp_path):
    write_shard(tmp_path / "clips-000.tar", records)
    write_shard(tmp_path / ".clips-000.host.1.partial.tar", records)
    for source in (tmp_path, f"{tmp_path}/*.tar"):
        assert sum(len(shard) for shard in find_clips([source])) == len(records)


def test_a_source_without_clips_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no clips at .*expected \.tar shards"):
        find_clips([tmp_path / "nowhere"])


def test_a_curation_that_is_not_finished_is_refused(records, tmp_path):
    run = Run(CurateConfig(input="videos", output=str(tmp_path)), tmp_path)
    run.source_digest.touch()
    run.scores(0).parent.mkdir(parents=True)
    run.scores(0).write_text("{}")
    for source in (tmp_path, f"{tmp_path}/*.tar"):  # no shard is finished yet
        with pytest.raises(ValueError, match=f"{tmp_path} is an unfinished curation"):
            find_clips([source])
    write_shard(run.shard(0), records)
    for source in (tmp_path, f"{tmp_path}/*.tar", f"{tmp_path}/clips-{{000000..000001}}.tar"):
        with pytest.raises(ValueError, match="start it again to go on, and train then"):
            find_clips([source])
    assert len(find_clips([run.shard(0)])) == 1, "a shard that is named stays the same"
    run.index.touch()  # The curation may be killed before it deletes its intermediate files.
    for source in (tmp_path, f"{tmp_path}/*.tar", f"{tmp_path}/clips-{{000000..000001}}.tar"):
        assert len(find_clips([source])[0]) == len(records)


def test_a_cache_that_lacks_shards_is_refused(records, tmp_path):
    write_shard(tmp_path / "clips-000000.tar", records)
    record = tmp_path / clip_index.CACHE_RECORD
    for planned, is_complete in ((2, False), (1, True), (None, True)):
        record.write_text(json.dumps({} if planned is None else {"num_shards": planned}))
        if is_complete:
            assert len(find_clips([tmp_path])[0]) == len(records)
        else:
            with pytest.raises(ValueError, match=f"{tmp_path} is an unfinished cache of latents"):
                find_clips([tmp_path])


def test_a_shard_that_ends_early_gives_what_it_holds(records, tmp_path, caplog):
    shard = write_shard(tmp_path / "clips.tar", records)
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) * 3 // 5])
    samples = ClipSamples([shard], SIZE, 8)
    assert 2 <= len(samples) <= 4
    assert {samples[position]["key"] for position in range(8)} <= set(records)


def test_held_out_clips_are_never_trained_on(folder, records, tmp_path):
    def keys(samples):
        return {record.key for record in samples.records}

    train = ClipSamples([folder], SIZE, 8, held_out_clips=2)
    shown = ClipSamples([folder], SIZE, 8, held_out_clips=2, shows_held_out=True)
    assert len(keys(train)) == len(train) == 3
    assert {train[position]["key"] for position in range(3)} == keys(train)
    assert len(keys(shown)) == len(shown) == 2
    assert not keys(train) & keys(shown)
    shard = write_shard(tmp_path / "clips.tar", records)
    assert keys(ClipSamples([shard], SIZE, 8, held_out_clips=2, shows_held_out=True)) == keys(shown)
    twice = ClipSamples([folder, shard], SIZE, 8, held_out_clips=2)
    assert len(twice) == 6
    assert not keys(twice) & keys(shown), "a copy in another source is held out too"
    kept, more = hold_out(find_clips([folder]), 3)
    assert keys(shown) < {record.key for record in more}
    by_hash = sorted(records, key=lambda key: hashlib.sha256(key.encode()).digest())
    assert [record.key for record in more] == by_hash[:3]
    assert {record.key for record in ClipList(kept)} == set(by_hash[3:])
    with pytest.raises(ValueError, match="held_out_clips must be less than the 5 clips of data, got 5"):
        ClipSamples([folder], SIZE, 8, held_out_clips=5)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 2), (3, 2)])
def test_every_clip_once_an_epoch_however_it_is_split(ranks, workers):
    sizes = [5, 1, 7, 3, 8]  # 24 clips
    read = []
    for rank in range(ranks):
        for worker in range(workers):
            order = ShuffledOrder(sizes, window=2, seed=0)  # every worker has its own copy
            batches = range(rank, 24, ranks)[worker::workers]  # three epochs in batches of 3
            read += [order[3 * batch + i] for batch in batches for i in range(3)]
    assert sorted(read) == sorted(list(range(24)) * 3)


def test_the_order_mixes_neighbouring_shards_alone_and_changes_from_epoch_to_epoch():
    order = ShuffledOrder([10] * 6, window=2, seed=0)
    first = [order[position] for position in range(60)]
    assert first != sorted(first)
    assert all(len({clip // 10 for clip in first[start : start + 20]}) == 2 for start in range(0, 60, 20))
    assert first != [order[position] for position in range(60, 120)]
    assert first == [ShuffledOrder([10] * 6, window=2, seed=0)[position] for position in range(60)]
