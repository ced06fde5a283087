"""The curation command, from files to shards: accepted and rejected sources, interruptions, and bad input."""

import contextlib
import fcntl
import io
import json
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import footage
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from imageconductor import config as config_file
from imageconductor.commands import curate
from imageconductor.curation.curate_config import CurateConfig
from imageconductor.data.clip_index import find_clips, index_path
from imageconductor.training.run import run_stage
from imageconductor.training.stages.registry import find_stage

ROOT = Path(__file__).parents[2]
SIZE = (256, 128)  # from footage of 192x128
SCALE = 4 / 3
GRID = 8
PANS = {"slow": (0.3, 0.1), "pan": (1.0, 0.3), "fast": (-1.6, 0.0), "diagonal": (0.9, -0.8), "up": (0.0, -1.2)}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Footage that gives clips, and footage for every reason of rejection."""
    root = tmp_path_factory.mktemp("videos")
    for number, (name, velocity) in enumerate(PANS.items()):
        footage.write(root / f"{name}.mp4", footage.pan(number, 60, velocity))
    (root / "pan.txt").write_text("a texture\nthat pans")
    footage.write(root / "still.mp4", footage.pan(8, 60, (0, 0)))
    scenes = [footage.pan(9, 30, (0.5, 0)), footage.pan(10, 55, (-0.8, 0.2)), footage.pan(11, 25, (1, 0))]
    footage.write(root / "sub folder" / "three scènes.mp4", np.concatenate(scenes))
    footage.write(root / "short.mp4", footage.pan(12, 20, (1, 0)))
    footage.write(root / "one frame.mp4", footage.pan(13, 1, (1, 0)))
    footage.write(root / "odd.mkv", footage.pan(14, 40, (0.8, 0), size=(171, 99)), codec="ffv1")
    uneven = np.cumsum([0, *([40] * 20), 900, *([40] * 20)])
    footage.write(root / "uneven.mp4", footage.pan(15, 42, (0.8, 0)), times=uneven.tolist())
    footage.write(root / "tiny.mp4", footage.pan(16, 40, (1, 0), size=(40, 32)))
    footage.write(root / "whip pan.mp4", footage.pan(17, 40, (18, 0), margin=400))  # moves on by three widths
    footage.write(root / "large.mp4", footage.pan(18, 40, (3, 0), size=(512, 256)))
    footage.write_sound(root / "sound.mp4")
    (root / "text.mp4").write_text("no video at all")
    (root / "empty.mp4").touch()
    whole = (root / "pan.mp4").read_bytes()
    (root / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    return root


def command(*arguments):
    return curate.main([str(argument) for argument in arguments])


def settings(videos, output, *more):
    return [
        "--config",
        ROOT / "configs/curate/folder.yaml",
        f"input={videos}",
        f"output={output}",
        f"size=[{SIZE[0]},{SIZE[1]}]",
        f"grid={GRID}",
        "clips_per_shard=5",
        "workers=2",
        *more,
    ]


@pytest.fixture(scope="module")
def curated(videos, tmp_path_factory):
    output = tmp_path_factory.mktemp("curated") / "out"
    assert command(*settings(videos, output)) == 0
    return output


@pytest.mark.parametrize("path", sorted((ROOT / "configs/curate").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_recipe_loads(path):
    config = config_file.load(CurateConfig, path, ["input=in", "output=out"])
    assert (config.num_frames, config.max_interval, config.grid, config.size) == (32, 16, 16, (384, 256))


def rows(output):
    return {row["source"]: row for row in pq.read_table(output / "index.parquet").to_pylist()}


def content(output):
    """The index and the bytes of all shards of a run and of their indices."""
    index = pq.read_table(output / "index.parquet").to_pylist()
    return index, {path.name: path.read_bytes() for path in sorted(output.glob("clips-*"))}


def record(output, row, ending):
    with tarfile.open(output / row["shard"]) as tar:
        return tar.extractfile(f"{row['key']}.{ending}").read()


def test_every_source_is_accepted_or_has_its_reason(curated):
    found = {name: row["reason"] for name, row in rows(curated).items()}
    assert found == {
        **{f"{name}.mp4": None for name in PANS if name != "slow"},
        "sub folder/three scènes.mp4": None,
        "odd.mkv": None,
        "large.mp4": None,
        "whip pan.mp4": "lost tracks",
        "slow.mp4": "moves least",
        "still.mp4": "still",
        "short.mp4": "too short",
        "one frame.mp4": "too short",
        "uneven.mp4": "uneven frame rate",
        "tiny.mp4": "too small",
        "sound.mp4": "no video",
        "text.mp4": "unreadable",
        "empty.mp4": "unreadable",
        "truncated.mp4": "unreadable",
    }
    assert all(row["accepted"] == (row["reason"] is None) for row in rows(curated).values())
    assert not (curated / "work").exists()
    assert not list(curated.glob(".*partial*"))


def test_each_shard_has_its_index(curated):
    shards = sorted(curated.glob("*.tar"))
    assert sorted(curated.glob("*.index.npz")) == [index_path(shard) for shard in shards]
    keys = [clip.key for shard in shards for clip in find_clips([shard])[0]]
    assert sorted(keys) == sorted(row["key"] for row in rows(curated).values() if row["accepted"])


def test_exactly_the_lowest_quarter_is_dropped(curated):
    scored = [row for row in rows(curated).values() if row["motion_score"] is not None]
    dropped = sorted(row["motion_score"] for row in scored if row["reason"] in ("still", "moves least"))
    kept = sorted(row["motion_score"] for row in scored if row["reason"] in (None, "lost tracks"))
    assert len(scored) == 10
    assert len(dropped) == 2
    assert dropped[-1] < kept[0]


def test_cuts_are_found_and_the_longest_scene_is_taken(curated):
    row = rows(curated)["sub folder/three scènes.mp4"]
    assert np.abs(np.array(row["cuts"]) - [30, 85]).max() <= 2
    assert 30 / 25 <= row["start_s"] < row["end_s"] <= 84.1 / 25
    assert all(not row["cuts"] for name, row in rows(curated).items() if row["accepted"] and "scènes" not in name)


@pytest.mark.parametrize("name", ["pan", "fast", "diagonal", "up"])
def test_tracks_follow_known_motion(name, curated):
    row = rows(curated)[f"{name}.mp4"]
    with np.load(io.BytesIO(record(curated, row, "tracks.npz"))) as arrays:
        points, visible = arrays["points"], arrays["visible"]
    assert points.dtype == np.float32
    assert points.shape == (GRID**2, 32, 2)
    steps = np.arange(32) * row["interval"]
    expected = points[:, :1] + SCALE * np.asarray(PANS[name]) * steps[:, None]
    error = np.linalg.norm(points - expected, axis=-1)[visible]
    assert error.mean() < 0.5
    inside = ((expected > 8) & (expected < np.array(SIZE) - 8)).all(-1)
    assert visible[inside].mean() > 0.9
    assert row["tracked_fraction"] == pytest.approx(visible.mean())
    d = np.linalg.norm(PANS[name]) * SCALE * row["interval"]
    assert row["motion_score"] == pytest.approx(d * np.sqrt(SIZE[0] * SIZE[1]), rel=0.1)


def test_a_clip_whose_points_are_lost_is_rejected(curated):
    row = rows(curated)["whip pan.mp4"]
    assert row["tracked_fraction"] == pytest.approx(192 / (2 * 18 * 31), abs=0.04)  # three widths pass
    assert row["detail"] == f"{row['tracked_fraction']:.3f} of the points could be followed"


def test_the_index_says_which_clips_are_enlarged(curated):
    scales = {name: row["scale"] for name, row in rows(curated).items() if row["accepted"]}
    assert scales == {
        **{f"{name}.mp4": pytest.approx(SCALE) for name in PANS if name != "slow"},
        "sub folder/three scènes.mp4": pytest.approx(SCALE),
        "odd.mkv": pytest.approx(256 / 171),
        "large.mp4": 0.5,
    }


def test_a_record_says_where_it_comes_from(curated):
    row = rows(curated)["pan.mp4"]
    info = json.loads(record(curated, row, "json"))
    assert info["caption"] == "a texture that pans"
    assert info["source"] == "pan.mp4"
    assert info["camera_only"] is False
    assert info["tracker"] == "opencv-lucas-kanade"
    assert info["fps"] == pytest.approx(25 / row["interval"])
    assert (info["end_s"] - info["start_s"]) * 25 == pytest.approx(31 * row["interval"])


def test_the_report_shows_counts_and_pictures(curated):
    page = (curated / "report.html").read_text()
    assert "7 of 18 sources became clips" in page
    assert "6 are enlarged from smaller footage" in page
    assert page.count("<img ") == 10
    assert page.count("<svg ") == 4
    assert "moves least" in page
    assert re.search(r"<h2>Lost tracks</h2>.*lost tracks: 0\.\d+ of the points.*tracked 0\.\d\d", page, re.DOTALL)
    assert "http" not in page.split("<h2>Settings")[0]


@pytest.mark.parametrize(
    ("stage", "more"), [("motion_controlnet", {}), ("camera_lora", {"lora_rank": 2}), ("object_lora", {"lora_rank": 2})]
)
def test_the_stages_train_on_the_shards(stage, more, curated, tiny_model, tmp_path):
    config = find_stage(stage).Config(
        model=str(tiny_model),
        data=[str(curated)],
        size=(32, 32),
        num_frames=4,
        max_steps=2,
        batch_size=2,
        max_corrupt_fraction=0.0,
        output=str(tmp_path / "run"),
        **more,
    )
    run_stage(config)
    assert list((tmp_path / "run" / stage).glob("*.safetensors"))


def test_a_finished_run_is_left_alone(videos, curated):
    before = {path: path.stat().st_mtime_ns for path in curated.glob("*.tar")}
    assert command(*settings(videos, curated)) == 0
    assert {path: path.stat().st_mtime_ns for path in curated.glob("*.tar")} == before


@pytest.mark.slow
def test_kills_and_the_number_of_processes_change_nothing(videos, curated, tmp_path):
    arguments = [sys.executable, ROOT / "scripts/curate.py", *settings(videos, tmp_path / "out", "workers=1")]
    chance = random.Random(0)

    def start():
        return subprocess.Popen([str(a) for a in arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def finished():
        paths = (tmp_path / "out").rglob("[!.]*")
        return {path for path in paths if path.suffix in (".tar", ".json", ".jsonl")}

    kills = 0
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        before, process = finished(), start()
        while finished() == before and process.poll() is None:  # Each attempt finishes at least one more file.
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(how)
            kills += 1
        process.wait(30)
    assert kills >= 2
    assert start().wait(120) == 0
    assert content(tmp_path / "out") == content(curated)
    assert not list((tmp_path / "out").rglob(".*partial*"))


@pytest.fixture(scope="module")
def ray():
    """Ray, which the first test starts and the others use again."""
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_batches_and_actors_change_nothing(ray, tmp_path):
    """CoTracker, whose stand-in looks at the clip, with clips one by one, and in threes by an actor of Ray."""
    footage.write_cotracker(tmp_path / "clone")
    for seed in range(4):
        footage.write(tmp_path / "videos" / f"{seed}.mp4", footage.pan(seed, 40, (1 + seed, 0)))
    network = ["tracker=cotracker", f"cotracker={tmp_path / 'clone'}", "device=cpu", "drop_fraction=0"]
    network += ["min_tracked_fraction=0", "num_frames=8"]
    for name, execution in (("local", ["batch_size=1"]), ("ray", ["batch_size=3", "executor=ray"])):
        assert command(*settings(tmp_path / "videos", tmp_path / name, *network, *execution)) == 0
    one_by_one, batched = content(tmp_path / "local"), content(tmp_path / "ray")
    assert one_by_one == batched
    assert {row["tracker"] for row in batched[0]} == {"cotracker3_offline"}
    assert len({row["track_length_px"] for row in batched[0]}) > 1


@pytest.mark.slow
def test_ray_makes_the_same_though_its_workers_are_killed(ray, videos, curated, tmp_path):
    killed, over = [], threading.Event()

    def kill():
        """Kills the first two tasks that are seen at work."""
        while len(killed) < 2 and not over.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ray::Map(_chunk_task)" in " ".join(process.cmdline()) and process.pid not in killed:
                        process.kill()
                        killed.append(process.pid)
                        break

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert command(*settings(videos, tmp_path / "out", "executor=ray")) == 0
    finally:
        over.set()
        killer.join()
    assert len(killed) == 2
    assert content(tmp_path / "out") == content(curated)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["grid=4"], "was begun with grid=8, not 4; name another folder"),
        (["seed=1"], "was begun with seed=0, not 1"),
        (["flow=raft", "raft_weights=x.pth"], "was begun with flow=dis, not raft"),
        (["tracker=cotracker"], "was begun with tracker=lucas_kanade, not cotracker"),
    ],
)
def test_a_run_continues_with_its_own_settings_only(more, said, videos, curated, capsys):
    assert command(*settings(videos, curated, *more)) == 2
    assert said in capsys.readouterr().err


def test_a_run_continues_on_another_machine(videos, curated):
    before = content(curated)
    elsewhere = ["device=cpu", "workers=1", "gpu_workers=4", "executor=ray"]
    assert command(*settings(videos, curated, *elsewhere)) == 0
    assert content(curated) == before


def test_how_a_run_of_an_earlier_version_was_executed_does_not_matter(videos, curated):
    saved = curated / "config.yaml"
    saved.write_text(re.sub(r"gpu_workers: .*\ngpus_per_worker: .*", "gpus_per_worker: 0.0", saved.read_text()))
    assert "gpus_per_worker: 0.0" in saved.read_text()
    assert command(*settings(videos, curated)) == 0


def test_a_run_continues_with_its_own_sources_only(curated, tmp_path, capsys):
    footage.write(tmp_path / "other.mp4", footage.pan(0, 40, (1, 0)))
    assert command(*settings(tmp_path, curated)) == 2
    assert "was begun with other sources" in capsys.readouterr().err


@pytest.mark.parametrize("old", ["drop_share: 0.25", "min_tracked: 0.1"])
def test_a_run_of_an_earlier_version_is_not_continued(old, videos, tmp_path, capsys):
    (tmp_path / ".sources").touch()
    (tmp_path / "config.yaml").write_text(f"input: {videos}\noutput: {tmp_path}\n{old}\n")
    assert command(*settings(videos, tmp_path)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "was begun with an earlier version whose settings have other names; name another folder" in line
    assert not (tmp_path / "work").exists()


def test_two_runs_do_not_write_to_one_folder(videos, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    with (output / ".sources").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert command(*settings(videos, output)) == 2
    assert "another process is writing into" in capsys.readouterr().err


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    (tmp_path / "list.csv").write_text("id,caption,path\na,,a.mp4\nb,,b.mp4\n")
    videos, output = f"input={tmp_path / 'videos'}", tmp_path / "out"
    for arguments, said in (
        (
            [f"input={tmp_path / 'list.csv'}", "source=csv", f"videos={tmp_path / 'off'}", f"output={output}"],
            f"videos={tmp_path / 'off'}: the footage of no source is there, such as {tmp_path / 'off' / 'a.mp4'}",
        ),
        ([f"input={tmp_path / 'nowhere'}", f"output={output}"], "no such file or folder"),
        ([f"input={tmp_path / 'empty'}", f"output={output}"], "holds nothing that source=folder could read"),
        ([videos, f"output={tmp_path / 'full'}"], "holds other files"),
        ([videos, f"output={output}", "tracker=cotracker", f"cotracker={tmp_path}"], "CoTracker"),
    ):
        assert command(*arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert said in error
        assert not output.exists()
    for arguments, said in (
        (["drop_fraction=1"], "drop_fraction must lie in [0, 1), got 1"),
        (["flow=raft"], "flow=raft needs raft_weights=FILE"),
        (["trakcer=x"], "did you mean 'tracker'?"),
        (["drop_share=0.3"], "it is called 'drop_fraction' now"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(f"input={tmp_path}", f"output={output}", *arguments)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
