"""The convert command: what it says, what it writes, and how it refuses."""

import json

import numpy as np
import pytest

from imageconductor.commands.convert import main
from imageconductor.conditioning.formats import FORMATS, read_tracks


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "ours.json"
    tracks = [{"points": [[20, 10], [30, 20], [100, 40]]}, {"points": [[40, 30]]}]
    path.write_text(json.dumps({"width": 128, "height": 64, "tracks": tracks}))
    return path


def test_it_says_what_it_read_and_what_is_lost(ours, tmp_path, capsys):
    assert main([str(ours), str(tmp_path / "x.npy"), "--to", "wan-move"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"read {ours}: imageconductor, 2 tracks, control points, 128x64, 1 hold still",
        "note: tracks were resampled to 81 points, the first and last point kept",
        "note: wan-move holds no frame size; this one is 128x64",
        f"wrote {tmp_path / 'x_tracks.npy'}, {tmp_path / 'x_visibility.npy'}: wan-move",
    ]
    back = [str(tmp_path / "x_tracks.npy"), str(tmp_path / "back.json"), "--size", "128x64"]
    assert main(back) == 0
    again = read_tracks(tmp_path / "back.json")
    assert again.size == (128, 64)
    assert again.tracks[0].points[[0, 40, 80]].tolist() == [[20, 10], [30, 20], [100, 40]]
    assert again.tracks[1].points.tolist() == [[40, 30]]


def test_suffixes_tell_the_form_or_it_is_asked_for(ours, tmp_path, capsys):
    for suffix, name in ((".pth", "ati"), (".pkl", "tapvid"), (".npz", "cotracker"), (".json", "imageconductor")):
        output = tmp_path / f"new{suffix}"
        assert main([str(ours), str(output)]) == 0
        assert read_tracks(output, drawn_size=(128, 64)).format == name
    capsys.readouterr()
    assert main([str(ours), str(tmp_path / "x.npy")]) == 2
    assert "name the form with --to, one of imageconductor, published" in capsys.readouterr().err


def test_several_tora_files_in_and_out(ours, tmp_path, capsys):
    assert main([str(ours), str(tmp_path / "t.txt")]) == 0
    files = [tmp_path / "t_0.txt", tmp_path / "t_1.txt"]
    assert main([*map(str, files), str(tmp_path / "both.json"), "--size", "128x64", "--frames", "5"]) == 0
    tracks = read_tracks(tmp_path / "both.json").tracks
    assert [len(track.points) for track in tracks] == [5, 1]
    assert np.abs(tracks[0].points[[0, -1]] - [[20, 10], [100, 40]]).max() <= 0.25
    out = capsys.readouterr().out
    assert "note: tora holds whole steps; positions were rounded" in out
    assert "points of 49 frames" in out


def test_tracks_are_thinned_out(tmp_path, capsys):
    np.savez(tmp_path / "t.npz", tracks=np.arange(10.0)[:, None, None] + np.arange(800).reshape(400, 2) % 97)
    assert main([str(tmp_path / "t.npz"), str(tmp_path / "thin.json"), "--size", "128x128", "--every", "2"]) == 0
    assert len(read_tracks(tmp_path / "thin.json", max_tracks=256).tracks) == 200
    assert "kept 200 of 400 tracks" in capsys.readouterr().out


def test_nothing_is_overwritten_unasked(ours, tmp_path, capsys):
    (tmp_path / "x_visibility.npy").touch()
    arguments = [str(ours), str(tmp_path / "x.npy"), "--to", "wan-move"]
    assert main(arguments) == 2
    assert "x_visibility.npy exists; name another, or pass --overwrite" in capsys.readouterr().err
    assert not (tmp_path / "x_tracks.npy").exists()
    assert main([*arguments, "--overwrite"]) == 0
    before = ours.read_bytes()
    assert main([str(ours), str(ours), "--to", "published", "--overwrite"]) == 2, "the input is not its own output"
    assert ours.read_bytes() == before


BAD = {
    "no size": (["{bare}", "x.json", "--from", "motionpro"], "motionpro files have 'traj_key_points'"),
    "size needed": (["{spline}", "x.json"], "kjnodes files state no frame size; give the one that was drawn in, as"),
    "wrong size": (["{spline}", "x.json", "--size", "12"], "--size must be WIDTHxHEIGHT in pixels, such as 576x320"),
    "no frames": (["{bare}", "x.json", "--frames", "0"], "--frames must be from 1 to 4096, got 0"),
    "absent": (["nowhere.json", "x.json"], "nowhere.json: no such trajectory file"),
    "a folder": (["{bare}", "{folder}", "--to", "published"], "is a folder; name a file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.json").write_text("[[[1, 1], [5, 5]]]")
    (tmp_path / "spline.json").write_text('[{"x": 1, "y": 1}]')
    (tmp_path / "folder").mkdir()
    paths = {path.stem: path for path in tmp_path.iterdir()}
    arguments, said = BAD[name]
    assert main([argument.format(**paths) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert set(tmp_path.iterdir()) == set(paths.values())


def test_help_lists_every_form(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in FORMATS)
    assert max(map(len, text.splitlines())) <= 120


def test_files_of_any_suffix_are_written_whole(tmp_path):
    drawn = tmp_path / "drawn.json"
    drawn.write_text('{"width": 64, "height": 48, "tracks": [{"points": [[8, 8], [40, 30]]}]}')
    for name, written in (("wangp", "out.wangp"), ("wan-move", "my_tracks.npz")):
        (tmp_path / written).write_text("old")
        assert main([str(drawn), str(tmp_path / written), "--to", name, "--overwrite"]) == 0
        assert np.load(tmp_path / written).shape[-1] == 2
    assert not list(tmp_path.glob(".*"))


def test_a_timed_drawing_is_placed_on_the_frames_that_the_tool_reads(tmp_path, capsys):
    track = {"points": [[0, 8], [10, 40], [20, 8]], "interpolation": "linear", "end": 60, "control": "object"}
    drawn = tmp_path / "drawn.json"
    drawn.write_text(json.dumps({"width": 64, "height": 48, "tracks": [track]}))
    assert main([str(drawn), str(tmp_path / "out.pth")]) == 0
    assert "does not say what a track moves" in capsys.readouterr().out
    points = read_tracks(tmp_path / "out.pth", drawn_size=(64, 48)).tracks[0].points
    assert points[30] == pytest.approx([10, 40], abs=1e-3)
    assert points[60] == pytest.approx(points[120], abs=1e-3)
    assert main([str(drawn), str(tmp_path / "again.json"), "--frames", "90"]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["tracks"][0]["control"] == "object"


def test_a_timed_drawing_keeps_the_frames_of_its_own_clip(tmp_path, capsys):
    track = {"points": [[0, 8], [20, 8]], "interpolation": "linear", "easing": "linear", "start": 1, "end": 3}
    drawn = tmp_path / "drawn.json"
    drawn.write_text(json.dumps({"width": 64, "height": 48, "num_frames": 64, "tracks": [track]}))
    assert main([str(drawn), str(tmp_path / "out.json")]) == 0
    assert "placed: 64 points for each track" in capsys.readouterr().out
    points = json.loads((tmp_path / "out.json").read_text())["tracks"][0]["points"]
    assert [x for x, _ in points[:5]] == pytest.approx([0, 0, 10, 20, 20], abs=1e-3)
    assert len(points) == 64


@pytest.mark.parametrize("fields", [{}, {"easing": "ease-in"}], ids=["plain", "timed"])
def test_a_drawing_keeps_its_number_of_frames_where_the_tool_takes_any(fields, tmp_path):
    track = {"points": [[0, 8], [10, 40], [20, 8]], **fields}
    drawn = tmp_path / "drawn.json"
    drawn.write_text(json.dumps({"width": 64, "height": 48, "num_frames": 24, "tracks": [track]}))

    def count(name, *arguments):
        output = tmp_path / "file"
        assert main([str(drawn), str(output), "--to", name, "--overwrite", *arguments]) == 0
        written = {"wan-move": tmp_path / "file_tracks.npy"}.get(name, output)
        tracks = read_tracks(written, drawn_size=(64, 48), format="ltx" if name == "ltx" else None).tracks
        return len(tracks[0].points)

    expected = dict.fromkeys(["cotracker", "tapvid", "kjnodes", "ltx", "wangp", "tora"], 24)
    expected |= {"wan-move": 81, "ati": 121}  # which take 4n + 1 and 121 alone
    assert {name: count(name) for name in expected} == expected
    assert count("cotracker", "--frames", "9") == 9
    drawn.write_text(json.dumps({"width": 64, "height": 48, "tracks": [track]}))
    assert {name: count(name) for name in ("cotracker", "tora")} == {"cotracker": 16, "tora": 49}


def test_a_clip_is_chosen_of_a_file_of_several_alone(tmp_path, capsys):
    drawn = tmp_path / "drawn.json"
    drawn.write_text("[[[8, 8], [40, 30]]]")
    assert main([str(drawn), str(tmp_path / "out.json"), "--sample", "bear"]) == 2
    assert "--sample chooses a clip of a tapvid file, and this one is published" in capsys.readouterr().err
