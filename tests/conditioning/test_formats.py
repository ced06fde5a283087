"""Other tools' track files: what their published examples look like, and which pixels their numbers mean."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from imageconductor.conditioning import Boxes, Trajectories
from imageconductor.conditioning.formats import read_tracks
from imageconductor.conditioning.formats.numpy_data import npz_bytes

SIZE = (512, 320)


def save_json(path, content):
    path.write_text(json.dumps(content))
    return path


def save_npy(path, array):
    np.save(path, array)
    return path


def objects(points):
    return [{"x": x, "y": y} for x, y in points]


LINE = [[10 + 3 * i, 20 + i] for i in range(16)]


def test_kjnodes_strings(tmp_path):
    one, two = save_json(tmp_path / "1.json", objects(LINE)), save_json(tmp_path / "2.json", [objects(LINE)] * 2)
    quoted = tmp_path / "quoted.txt"
    quoted.write_text(str([objects(LINE)] * 2))  # with ', as Python prints it
    texts = save_json(tmp_path / "texts.json", [json.dumps(objects(LINE)), json.dumps(objects(LINE))])
    encoded = save_json(tmp_path / "encoded.json", json.dumps([objects(LINE)] * 2))
    for path, count in ((one, 1), (two, 2), (quoted, 2), (texts, 2), (encoded, 2)):
        file = read_tracks(path, drawn_size=SIZE)
        assert (file.format, len(file.tracks), file.notes) == ("kjnodes", count, ())
        assert all(track.per_frame and track.points.tolist() == LINE for track in file.tracks)


def test_kjnodes_points_store_and_short_lists_are_control_points(tmp_path):
    points = [[0.5, 1.25], [100, 300], [200, 7]]
    store = [{"points": objects(points * 6), "color": "#1f77b4", "name": "Spline 1"}]
    assert not read_tracks(save_json(tmp_path / "store.json", store), drawn_size=SIZE).tracks[0].per_frame
    short = read_tracks(save_json(tmp_path / "short.json", [objects(points)]), drawn_size=SIZE)
    assert short.tracks[0].points.tolist() == points
    assert not short.tracks[0].per_frame
    drawn = Trajectories.load(tmp_path / "short.json", 7, drawn_size=SIZE)
    assert torch.equal(drawn.points, Trajectories.from_tracks([points], SIZE, 7).points)


def test_editors_reach_the_border_and_not_beyond(tmp_path):
    path = save_json(tmp_path / "border.json", [objects([[512, 320], [0, 0]])])
    points = read_tracks(path, drawn_size=SIZE).tracks[0].points
    assert points.tolist() == [[512 - 1 / 64, 320 - 1 / 64], [0, 0]]
    save_json(path, [objects([[513, 320], [0, 0]])])
    with pytest.raises(ValueError, match=r"track 0, point 0 at \(513, 320\).*\[0, 512\]"):
        read_tracks(path, drawn_size=SIZE)
    with pytest.raises(ValueError, match=r"outside the 100x100 frame.*that size was assumed.*--trajectories-size"):
        read_tracks(path, image_size=(100, 100))


def test_ltx_tracks_of_different_length_end_hidden(tmp_path):
    path = save_json(
        tmp_path / "ltx.json", [objects(LINE), objects(LINE[:4]), objects([[5, 5]]), objects([[6, 6]] * 16)]
    )
    file = read_tracks(path, drawn_size=SIZE, format="ltx")
    assert [len(track.points) for track in file.tracks] == [16, 16, 1, 1]
    assert file.tracks[1].visible.tolist() == [True] * 4 + [False] * 12
    assert "different lengths" in file.notes[0]
    assert Trajectories.load(path, 16, drawn_size=SIZE).still.tolist() == [False, False, True, True]


def test_motionpro_and_draganything(tmp_path):
    path = save_json(tmp_path / "meta_data.json", {"traj_key_points": [[[1, 2], [30, 40], [3, 9]], [[5, 6]]]})
    drawn = Trajectories.load(path, 16, drawn_size=SIZE)
    assert torch.equal(drawn.points, Trajectories.from_tracks([[[1, 2], [30, 40], [3, 9]], [[5, 6]]], SIZE, 16).points)
    assert drawn.still.tolist() == [False, True]
    objects_file = {"1": {"comment": "", "mask_name": "1.jpg", "trajectory": LINE}, "2": {"trajectory": [[4, 4]] * 16}}
    file = read_tracks(save_json(tmp_path / "demo.json", objects_file), image_size=(640, 480))
    assert (file.format, file.size, len(file.tracks[1].points)) == ("draganything", (640, 480), 1)
    assert file.notes == (f"{tmp_path / 'demo.json'} (draganything) states no frame size; 640x480 was assumed",)


def test_the_centres_of_boxes_are_tracks(tmp_path):
    dog = {"name": "dog", "boxes": [[60, 90, 180, 200], [200, 60, 360, 230]], "frames": [0, 15]}
    ball = {"name": "ball", "boxes": [[20, 200, 40, 220], None], "frames": [0, 8]}
    edge = {"name": "dot", "boxes": [[0, 0, 0.5, 0.5], [511.5, 319.5, 512, 320]], "frames": [0, 15]}
    form = {"width": 512, "height": 320, "num_frames": 16, "objects": [dog, ball, edge]}
    path = save_json(tmp_path / "boxes.json", form)
    tracks, centres = Trajectories.load(path, 16), Boxes.load(path, 16).centres()
    assert (read_tracks(path).format, tracks.size) == ("boxes", SIZE)
    assert torch.equal(tracks.visible, centres.visible)
    torch.testing.assert_close(tracks.points[tracks.visible], centres.points[centres.visible])
    assert tracks.points[0, [0, 15]].tolist() == [[119.5, 144.5], [279.5, 144.5]]
    assert tracks.visible[1].tolist() == [True] * 8 + [False] * 8
    assert Trajectories.load(path, 32).points[0, -1].tolist() == [279.5, 144.5]
    save_json(path, {**form, "objects": [{**dog, "boxes": [[60, 90, 60, 200], None]}]})
    with pytest.raises(ValueError, match=r"boxes.json: object 0 .*, frame 0: the box .* has no area"):
        read_tracks(path)
    save_json(path, {**form, "num_frames": "16"})
    with pytest.raises(ValueError, match="num_frames must be a whole number"):
        read_tracks(path)


def test_wan_move_pair(tmp_path):
    points = np.zeros((1, 81, 2, 2), np.float32)
    points[0, :, 0] = np.stack([np.linspace(-20, 60, 81), np.full(81, 7)], -1)
    points[0, :, 1] = [3, 4]
    visible = np.ones((1, 81, 2), bool)
    visible[0, :10, 0] = False
    tracks, flags = save_npy(tmp_path / "a_tracks.npy", points), tmp_path / "a_visibility.npy"
    for kept in (visible, visible[0], visible[..., None], visible.astype(np.float64)):
        np.save(flags, kept)
        for paths in (tracks, [tracks, flags], [flags, tracks]):
            file = read_tracks(paths, drawn_size=SIZE)
            assert (file.format, file.notes) == ("wan-move", ())
            np.testing.assert_allclose(file.tracks[0].points, points[0, :, 0])
            assert file.tracks[0].visible.tolist() == visible[0, :, 0].tolist()
            assert len(file.tracks[1].points) == 1
    np.save(flags, visible[:, :80])
    with pytest.raises(ValueError, match=r"visibility must be \(81, 2\)"):
        read_tracks(tracks, drawn_size=SIZE)
    flags.unlink()
    assert "without visibility" in read_tracks(tracks, drawn_size=SIZE).notes[0]
    assert read_tracks(save_npy(tmp_path / "b.npy", points[0]), drawn_size=SIZE).format == "wan-move"


def test_wangp_is_relative_and_hidden_where_minus_one(tmp_path):
    points = np.full((20, 1, 2), -1, np.float32)
    points[5:15, 0] = np.stack([np.linspace(0.25, 0.75, 10), np.full(10, 0.5)], -1)
    file = read_tracks(save_npy(tmp_path / "designer.npy", points), drawn_size=SIZE)
    track = file.tracks[0]
    assert (file.format, track.visible.sum()) == ("wangp", 10)
    assert track.points[[5, 14]].tolist() == [[128, 160], [384, 160]]
    assert track.points[0].tolist() == [128, 160], "padding is no position"
    with pytest.raises(ValueError, match=r"relative to the picture; give its size"):
        read_tracks(tmp_path / "designer.npy")


def ati_bytes(array):
    return npz_bytes(array=(8 * np.asarray(array)).astype(np.float32))


def test_ati_counts_from_the_edge_in_eighths(tmp_path):
    steps = np.zeros((1, 121, 1, 3))
    steps[0, :60, 0] = [[10.5 + i, 20.5, 1] for i in range(60)]
    torch.save(ati_bytes(steps), tmp_path / "track.pth")
    file = read_tracks(tmp_path / "track.pth", image_size=SIZE)
    track = file.tracks[0]
    assert (file.format, track.visible.sum()) == ("ati", 60)
    assert track.points[[0, 59]].tolist() == [[10, 20], [69, 20]], "half a pixel less"
    assert track.points[60:].tolist() == [[69, 20]] * 61, "hidden zeros are padding"
    extra = np.insert(steps, 2, 5.0, axis=-1)
    torch.save(ati_bytes(extra), tmp_path / "extra.pth", _use_new_zipfile_serialization=False)
    assert np.array_equal(read_tracks(tmp_path / "extra.pth", image_size=SIZE).tracks[0].visible, track.visible)


def test_tora_is_stretched_and_a_file_is_a_track(tmp_path):
    (tmp_path / "2.txt").write_text("0,0\n98, 186\n\n128.0,64\n")
    (tmp_path / "10.txt").write_text("256,256\n" * 5)
    file = read_tracks(tmp_path / "2.txt", image_size=(720, 480))
    assert file.notes == (f"{tmp_path / '2.txt'} (tora): its canvas of 256x256 was stretched over 720x480",)
    assert file.tracks[0].points.tolist() == [[0, 0], [98 * 720 / 256, 186 * 480 / 256], [360, 120]]
    folder = read_tracks(tmp_path, drawn_size=(512, 256))
    assert [len(track.points) for track in folder.tracks] == [3, 1], "in the order of the numbers"
    assert (folder.tracks[1].points < [512, 256]).all()
    assert read_tracks([tmp_path / "10.txt", tmp_path / "2.txt"], drawn_size=SIZE).tracks[1].per_frame
    assert read_tracks(tmp_path / "2.txt").size == (256, 256)


def jpeg(size):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tapvid_counts_from_the_corner(tmp_path, protocol):
    points = np.zeros((2, 5, 2), np.float32)
    points[0, :, 0] = np.linspace(0, 1, 5)
    occluded = np.zeros((2, 5), bool)
    occluded[0, 4] = occluded[1, 0] = True
    clip = {"video": np.zeros((5, 10, 20, 3), np.uint8), "points": points, "occluded": occluded}
    davis = {"bear": clip, "goat": clip | {"points": np.asfortranarray(points[:, ::-1])}}
    path = tmp_path / "davis.pkl"
    path.write_bytes(pickle.dumps(davis, protocol=protocol))
    file = read_tracks(path)
    assert (file.format, file.size) == ("tapvid", (20, 10))
    assert file.tracks[0].points[[0, 2, 4]].tolist() == [[-0.5, -0.5], [9.5, -0.5], [19.5, -0.5]]
    assert file.tracks[0].visible.tolist() == [True] * 4 + [False]
    assert "holds 2 clips; 'bear', the first, was taken" in file.notes[0]
    goat = read_tracks(path, sample="goat")
    assert goat.tracks[0].points[0].tolist() == [19.5, -0.5]
    with pytest.raises(ValueError, match=r"no clip 'cat' among its 2: bear, goat"):
        read_tracks(path, sample="cat")
    shard = [clip | {"video": [jpeg((40, 30))] * 5}]
    path.write_bytes(pickle.dumps(shard, protocol=protocol))
    assert read_tracks(path).size == (40, 30)


def test_cotracker_saves(tmp_path):
    random = np.random.default_rng(0)
    tracks = np.cumsum(random.normal(size=(1, 24, 3, 2)), 1) + 100 * random.random((1, 1, 3, 2))
    visible = random.random((1, 24, 3)) < 0.7
    for keys in (("tracks", "visibility"), ("pred_tracks", "pred_visibility")):
        for flags in (visible, visible[..., None]):
            np.savez(tmp_path / "t.npz", **dict(zip(keys, (tracks, flags), strict=True)))
            file = read_tracks(tmp_path / "t.npz", drawn_size=SIZE)
            assert file.format == "cotracker"
            for n, track in enumerate(file.tracks):
                assert np.array_equal(track.points, tracks[0, :, n])
                assert np.array_equal(track.visible, visible[0, :, n])
    np.savez(tmp_path / "metres.npz", tracks_XYZ=np.zeros((4, 2, 3)))
    with pytest.raises(ValueError, match=r"TAPVid-3D's are metres"):
        read_tracks(tmp_path / "metres.npz", drawn_size=SIZE)


def test_tracks_before_frames_are_noticed(tmp_path):
    tracks = np.stack([np.linspace([20, 20], [40, 30], 16), np.tile([5.0, 50.0], (16, 1))])
    path = save_npy(tmp_path / "tracker.npy", tracks)
    with pytest.raises(ValueError, match=r"\(2, 16, 2\).*transpose\(1, 0, 2\)"):
        read_tracks(path, drawn_size=SIZE)
    assert len(read_tracks(path, drawn_size=SIZE, format="wan-move").tracks) == 16, "the user knows better"
    save_npy(path, tracks.transpose(1, 0, 2))
    assert read_tracks(path, drawn_size=SIZE).tracks[0].points[-1].tolist() == [40, 30]
    grid = np.stack(np.meshgrid(np.arange(16) * 20.0, np.arange(16) * 20.0), -1).reshape(1, 256, 2)
    for steps in (np.linspace(0, 30, 16), np.linspace(0, 900, 16)):  # slow, and faster than the tracks are apart
        moving = grid + steps[:, None, None] * [1.0, 0.3]
        assert len(read_tracks(save_npy(path, moving), drawn_size=SIZE).tracks) == 256
    save_npy(path, (grid + np.linspace(0, 30, 16)[:, None, None]).transpose(1, 0, 2))
    with pytest.raises(ValueError, match=r"\(256, 16, 2\).*transpose"):
        read_tracks(path, drawn_size=SIZE)


def test_sg_i2v_is_read_if_named(tmp_path):
    boxes = np.cumsum(np.ones((3, 16, 2)), 1)
    file = read_tracks(save_npy(tmp_path / "traj.npy", boxes), drawn_size=SIZE, format="sg-i2v")
    assert [track.points[0].tolist() for track in file.tracks] == [[3, 3]] * 3
    assert len(file.tracks[0].points) == 14
    assert read_tracks(tmp_path / "traj.npy", drawn_size=SIZE).format == "wan-move"


def test_the_name_does_not_decide(tmp_path):
    np.savez(tmp_path / "t.npz", tracks=np.random.default_rng(0).random((9, 2, 2)) * 99)
    wrong = (tmp_path / "t.npz").rename(tmp_path / "t.json")
    assert read_tracks(wrong, drawn_size=SIZE).format == "cotracker"
    with pytest.raises(ValueError, match=r"holds an npz archive; published files are JSON"):
        read_tracks(wrong, drawn_size=SIZE, format="published")
    with pytest.raises(ValueError, match=r"unknown form 'kjnode'; there are imageconductor, published"):
        read_tracks(wrong, format="kjnode")


def test_a_stated_size_wins(tmp_path):
    ours = {"width": 64, "height": 48, "tracks": [{"points": [[1, 1]]}]}
    file = read_tracks(save_json(tmp_path / "ours.json", ours), drawn_size=SIZE)
    assert file.size == (64, 48)
    assert "states a frame of 64x48" in file.notes[0]


def test_unstated_sizes(tmp_path, caplog):
    bare = save_json(tmp_path / "bare.json", [[[1, 2], [30, 40]]])
    assert read_tracks(bare).size == (384, 256)
    assert read_tracks(bare, image_size=(900, 600)).size == (384, 256), "as the release does"
    assert read_tracks(bare, published_size=(64, 64)).size == (64, 64)
    Trajectories.load(bare, 4)
    assert "states no frame size; 384x256 was assumed" in caplog.text
    spline = save_json(tmp_path / "spline.json", objects(LINE))
    with pytest.raises(ValueError, match=r"kjnodes files state no frame size; give the one"):
        read_tracks(spline)


@pytest.mark.parametrize("kind", ["f4", "f2", "bool", "u1", "i8", "f8"])
def test_visibility_in_fractions_holds_from_a_half_on_and_flags_as_they_are(tmp_path, kind):
    tracks = np.cumsum(np.ones((4, 2, 2)), 0)
    flags = np.array([[1, 0.02], [0.98, 0.4], [0.6, 1], [0, np.nan]])
    is_fraction = kind in ("f4", "f2")
    values = flags.astype(kind) if is_fraction else (3 if kind in ("u1", "i8") else 1) * (flags > 0.5).astype(kind)
    np.savez(tmp_path / "t.npz", tracks=tracks, visibility=values)
    np.save(tmp_path / "t_tracks.npy", tracks)
    np.save(tmp_path / "t_visibility.npy", values)
    clip = {"points": tracks.transpose(1, 0, 2) / 512, "occluded": 1 - values.T if is_fraction else values.T == 0}
    (tmp_path / "t.pkl").write_bytes(pickle.dumps({"bear": clip}))
    for name in ("t.npz", "t_tracks.npy", *(["t.pkl"] if kind != "f2" else [])):
        file = read_tracks(tmp_path / name, drawn_size=SIZE)
        seen = np.stack([track.visible for track in file.tracks], 1)
        assert np.array_equal(seen, flags > 0.5)
        assert any("in fractions; what is above 0.5 was taken as set" in note for note in file.notes) == is_fraction


@pytest.mark.parametrize("num_frames", [4, 16, 31, 121])
def test_measured_tracks_are_resampled_between_visible_frames(tmp_path, num_frames):
    line = np.stack([np.arange(31) * 4.0, np.arange(31) ** 2.0], -1)
    visible = np.ones(31, bool)
    visible[10:16] = False
    given = line.copy()
    given[10:16] = [[0, 0], [-1, -1], [np.nan, 5], [500, 500], [0, 0], [0, 0]]
    np.savez(tmp_path / "t.npz", tracks=given[:, None], visibility=visible[:, None])
    loaded = Trajectories.load(tmp_path / "t.npz", num_frames, drawn_size=(2000, 2000))
    points, seen = loaded.points[0].numpy(), loaded.visible[0].numpy()
    assert points[[0, -1]].tolist() == line[[0, -1]].tolist()
    at = np.linspace(0, 30, num_frames)
    expected = [bool(visible[int(np.floor(t))] and visible[int(np.ceil(t))]) for t in at.round(9)]
    assert seen.tolist() == expected
    np.testing.assert_allclose(points[seen, 1], np.interp(at, np.arange(31), line[:, 1])[seen])
    between = (points[~seen, 0] > 4 * 9) & (points[~seen, 0] < 4 * 16)
    assert between.all() or num_frames == 31, "neither padding nor a hidden guess bends the track"
    assert np.isfinite(points).all()
