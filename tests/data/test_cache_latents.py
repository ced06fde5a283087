"""The command that encodes clips before training: what it loads, who decodes, where it encodes, and bad input."""

import io
import json
import os
import shutil
import tarfile

import footage
import numpy as np
import pytest
import torch
from clip_files import write_shard

from imageconductor.data.clip_index import find_clips
from scripts import cache_latents


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Folder of four clips, of which the third is no video."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(4):
        footage.write(folder / f"clip-{number}.mp4", footage.pan(number, 5, (1, 0), size=(64, 32)))
        np.savez(folder / f"clip-{number}.tracks.npz", points=np.zeros((2, 5, 2)), visible=np.ones((2, 5), bool))
        (folder / f"clip-{number}.json").write_text(json.dumps({"caption": f"clip {number}"}))
    (folder / "clip-2.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def encoders(tiny_model, tmp_path_factory):
    """Folder of a model that lacks everything but autoencoder and text encoder."""
    folder = tmp_path_factory.mktemp("model") / "encoders"
    folder.mkdir()
    for part in ("vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(tiny_model / part)
    return folder


def cache(clips, model, output, *more):
    arguments = [f"data=[{clips}]", f"model={model}", f"output={output}", "size=[32,32]", "clips_per_shard=2", *more]
    return cache_latents.main(arguments)


def read(output):
    """Every file in the shards of a cache, decoded if it is of arrays."""
    found = {}
    for shard in sorted(output.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                content = found[member.name] = tar.extractfile(member).read()
                if member.name.endswith("npz"):
                    with np.load(io.BytesIO(content)) as arrays:
                        found[member.name] = dict(arrays)
    return found


def test_only_autoencoder_and_text_encoder_are_loaded_and_other_processes_decode(
    clips, encoders, monkeypatch, tmp_path
):
    def note_process(*arguments):
        (tmp_path / str(os.getpid())).touch()
        return fit_to_size(*arguments)

    fit_to_size = cache_latents.fit_to_size
    monkeypatch.setattr(cache_latents, "fit_to_size", note_process)
    assert cache(clips, encoders, tmp_path / "two", "num_workers=2") == 0
    decoded_by = {path.name for path in tmp_path.iterdir() if path.name.isdigit()}
    assert len(decoded_by) == 2
    assert str(os.getpid()) not in decoded_by
    assert cache(clips, encoders, tmp_path / "none", "num_workers=0") == 0
    two, none = read(tmp_path / "two"), read(tmp_path / "none")
    assert {name.partition(".")[0] for name in two} == {"clip-0", "clip-1", "clip-3"}
    np.testing.assert_equal(two, none)


def test_the_parts_together_are_the_cache_and_a_missing_shard_is_made_anew(clips, encoders, tmp_path):
    assert cache(clips, encoders, tmp_path / "whole", "num_workers=0") == 0
    for part in (0, 1):
        assert cache(clips, encoders, tmp_path / "parts", f"part={part}", "parts=2", "num_workers=0") == 0
        assert len(list((tmp_path / "parts").glob("*.tar"))) == part + 1
        if part == 0:
            with pytest.raises(ValueError, match="is an unfinished cache of latents"):
                find_clips([tmp_path / "parts"])
    assert len(find_clips([tmp_path / "parts"])) == 2
    (tmp_path / "parts" / "clips-000000.tar").unlink()
    assert cache(clips, encoders, tmp_path / "parts", "num_workers=0") == 0
    np.testing.assert_equal(read(tmp_path / "parts"), read(tmp_path / "whole"))


def test_shards_of_other_clips_or_settings_are_not_taken_for_these(clips, encoders, tmp_path, capsys):
    assert cache(clips, encoders, tmp_path / "cache", "num_workers=0") == 0
    before = read(tmp_path / "cache").keys()
    more = tmp_path / "clips"
    shutil.copytree(clips, more)
    for path in sorted(more.glob("clip-0.*")):
        shutil.copy(path, path.with_name(path.name.replace("clip-0", "a")))
    for source, changes, said in (
        (clips, ["size=[16,16]"], "size was [32, 32] and now [16, 16]"),
        (more, [], "clips was 4"),
    ):
        capsys.readouterr()
        assert cache(source, encoders, tmp_path / "cache", "num_workers=0", *changes) == 2
        assert said in capsys.readouterr().err
    assert read(tmp_path / "cache").keys() == before


@pytest.mark.parametrize("in_shards", [False, True])
def test_clips_of_the_same_names_with_other_captions_are_not_taken_for_these(
    in_shards, clips, encoders, tmp_path, capsys
):
    sources = []
    for caption in ("", "a captioned clip"):
        folder = tmp_path / f"clips of {len(sources)}"
        shutil.copytree(clips, folder)
        for path in folder.glob("*.json"):
            path.write_text(json.dumps({"caption": caption}))
        sources.append(folder)
        if in_shards:
            records = {key: {} for key in ("clip-0", "clip-1", "clip-3")}
            for key, parts in records.items():
                parts |= {path.name.split(".", 1)[1]: path.read_bytes() for path in folder.glob(f"{key}.*")}
            sources[-1] = tmp_path / f"shards of {len(sources)}"
            sources[-1].mkdir()
            write_shard(sources[-1] / "clips-000000.tar", records)
    assert cache(sources[0], encoders, tmp_path / "cache", "num_workers=0") == 0
    assert cache(sources[0].rename(tmp_path / "moved"), encoders, tmp_path / "cache", "num_workers=0") == 0
    capsys.readouterr()
    assert cache(sources[1], encoders, tmp_path / "cache", "num_workers=0") == 2
    said = capsys.readouterr().err
    assert "clips was" in said
    assert "name another output, or delete it" in said


@pytest.mark.parametrize(
    ("settings", "num_gpus", "device"),
    [
        ({"part": 5, "parts": 8}, 8, "cuda:5"),
        ({"part": 5, "parts": 8}, 4, "cuda:1"),
        ({}, 8, "cuda:0"),
        ({"part": 5, "parts": 8}, 0, "cpu"),
        ({"part": 5, "parts": 8, "device": "cuda:7"}, 8, "cuda:7"),
    ],
)
def test_parts_take_the_gpus_in_turn(settings, num_gpus, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert cache_latents._choose_device(cache_latents.CacheConfig(data=["clips"], **settings)) == device


def test_bad_input_is_one_line_before_weights_are_read(clips, encoders, monkeypatch, capsys, tmp_path):
    assert cache(clips, encoders, tmp_path / "cache", "num_workers=0") == 0
    monkeypatch.setattr(cache_latents.Encoders, "load", lambda _: pytest.fail("weights were read"))
    (tmp_path / "file").touch()
    for arguments, said in (
        ((clips, encoders, tmp_path / "out", "size=[32,33]"), "size must be in multiples of 2 for this model"),
        ((clips, clips, tmp_path / "out"), f"{clips} lacks vae, text_encoder, tokenizer"),
        ((tmp_path / "cache", encoders, tmp_path / "out"), "holds latents already"),
        ((clips, encoders, tmp_path / "file" / "out"), "file is no folder"),
    ):
        capsys.readouterr()
        assert cache(*arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert said in line
        assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        cache(clips, encoders, tmp_path / "out", "num_workers=-1")


def test_a_decoding_process_that_is_killed_ends_the_command_with_a_way_on(
    clips, encoders, monkeypatch, capfd, tmp_path
):
    monkeypatch.setattr(cache_latents, "fit_to_size", lambda *_: os.kill(os.getpid(), 9))
    assert cache(clips, encoders, tmp_path / "out", "num_workers=1") == 1
    assert "once that is solved, the same command continues from here" in capfd.readouterr().err
    assert not list((tmp_path / "out").iterdir())
