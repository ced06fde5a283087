"""Damaged and malicious track files: refused in one line, at once, and without running anything in them."""

import io
import json
import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import torch

from imageconductor.conditioning.formats import read_tracks, tapvid
from imageconductor.conditioning.formats.numpy_data import npz_bytes

SIZE = (512, 320)


class Calls:
    """Pickles as a call of os.mkdir, which leaves a trace when it happens."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def refuse(path, said, **options):
    """The refusal: one line that names the file, within seconds."""
    began = time.monotonic()
    with pytest.raises(ValueError, match=said) as error:
        read_tracks(path, drawn_size=SIZE, **options)
    assert time.monotonic() - began < 20  # minutes without the checks
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


def npy_bytes(shape, descr="<f4", data=b""):
    header = str({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_that_calls_is_refused_and_the_call_does_not_happen(tmp_path, protocol):
    trace, path = tmp_path / "called", tmp_path / "f.pkl"
    points = np.zeros((1, 2, 2))
    for content in (
        Calls(trace),
        {"bear": {"points": points, "occluded": points[..., 0] > 0, "video": Calls(trace)}},
        {"bear": {"points": np.array([Calls(trace)], dtype=object), "occluded": points}},
    ):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        refuse(path, r"only n|pickle names|array of O")
        assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists(), "the pickle does what it is meant to do where it is trusted"


@pytest.mark.parametrize(
    "name",
    ["numpy._core.multiarray fromfile", "numpy.lib._npyio_impl load", "builtins eval", "numpy ndarray.tofile"],
)
def test_names_beside_the_arrays_are_refused(tmp_path, name):
    module, function = name.split()
    path = tmp_path / "f.pkl"
    path.write_bytes(b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"(X\x01\x00\x00\x00atR.")
    refuse(path, rf"the pickle names '{module}.{function}'.*nothing was run")


def test_arrays_of_a_pickle_are_checked(tmp_path):
    path = tmp_path / "f.pkl"
    array = pickle.dumps(np.zeros((3, 4)), protocol=2)
    for old, new, said in (
        (b"K\x03K\x04\x86", b"K\x7fK\x7f\x86", r"shape \(127, 127\) with 96 bytes"),
        (b"f8", b"V8", "an array of V8; only numbers and booleans"),
        (b"cnumpy\ndtype", b"cnumpy\nndarray", "an array without _reconstruct"),
    ):
        assert old in array
        path.write_bytes(array.replace(old, new))
        refuse(path, said)
    for damaged in (array[:-20], b"\x80\x04.", b"\x80\x04" + b"\xff" * 50):
        path.write_bytes(damaged)
        refuse(path, "damaged pickle")
    path.write_bytes(b"\x80\x02}r\x00\x00\x10\x00.")
    refuse(path, "a memo beyond its parts")


def test_a_pickle_of_very_many_parts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tapvid, "_MAX_OPCODES", 300_000)
    path = tmp_path / "f.pkl"
    path.write_bytes(b"\x80\x02" + b"]0" * 10**7 + b"N.")
    with pytest.raises(ValueError, match="more than 300000 parts"):
        read_tracks(path, drawn_size=SIZE)
    path.write_bytes(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".")
    refuse(path, "no clip|tapvid clips")


def test_ati_files_that_call_or_hold_something_else(tmp_path):
    trace, path = tmp_path / "called", tmp_path / "track.pth"
    torch.save(Calls(trace), path)
    refuse(path, "no ATI file, or holds more than data")
    torch.save(Calls(trace), path, _use_new_zipfile_serialization=False)
    refuse(path, "no ATI file, or holds more than data")
    torch.save(bytes(1 << 20), path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in stored.infolist():
            packed.writestr(member.filename, stored.read(member))
    assert (tmp_path / "packed.pth").stat().st_size < 1 << 14
    refuse(tmp_path / "packed.pth", "it is compressed, as torch writes none")
    objects = io.BytesIO()
    np.savez(objects, array=np.array([Calls(trace)], dtype=object))
    torch.save(objects.getvalue(), path)
    refuse(path, "array holds pickled Python objects")
    assert not trace.exists()
    for content, said in (
        ({"array": 1}, "found dict"),
        (b"PK\x03\x04 cut short", "damaged archive"),
        (npz_bytes(points=np.zeros((1, 121, 1, 3))), "found points float64"),
        (npz_bytes(array=np.zeros((1, 121, 3))), r"found array float64 \(1, 121, 3\)"),
    ):
        torch.save(content, path)
        refuse(path, said)


def test_object_arrays_are_not_loaded(tmp_path):
    trace, path = tmp_path / "called", tmp_path / "tracks.npy"
    np.save(path, np.array({"tracks": Calls(trace)}, dtype=object), allow_pickle=True)
    refuse(path, r"pickled Python objects.*Diffusion as Shader.*np\.savez")
    np.savez(path.with_suffix(".npz"), tracks=np.array([Calls(trace)], dtype=object))
    refuse(path.with_suffix(".npz"), "pickled Python objects")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npy_bytes((1, 81, 10**7, 2)), "more than 256 MiB"),
        (npy_bytes((1, 81, 10**30, 2)), "more than 256 MiB"),
        (npy_bytes((1, 81, 100, 2), data=b"\0" * 100), "promises 64800 bytes of data, it has 100"),
        (npy_bytes((1, 81, -1, 2)), "not numbers"),
        (npy_bytes((4, 2, 2), "<U4", b"\0" * 400), "not numbers"),
        (npy_bytes((4, 2, 2), [("x", "<f4")], b"\0" * 400), "not numbers"),
        (npy_bytes((4, 2, 3), data=b"\0" * 400), r"read as \(T, N, 2\)"),
        (npy_bytes((0, 2, 2)), "no points|no frame"),
        (b"\x93NUMPY\x01\x00\x40\x00" + b"(" * 64, "damaged NumPy header"),
        (b"\x93NUMPY\x09\x00\xff\xff", "damaged NumPy header"),
        (b"PK\x03\x04" + b"\0" * 60, "damaged archive"),
    ],
)
def test_headers_are_not_believed(tmp_path, content, said):
    (tmp_path / "tracks.npy").write_bytes(content)
    refuse(tmp_path / "tracks.npy", said)


def test_archives_are_checked_member_by_member(tmp_path):
    path = tmp_path / "t.npz"
    for member, said in ((npy_bytes((1, 81, 10**6, 2)), "t.npz, tracks"), (b"nothing", "damaged NumPy header")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tracks.npy", member)
        refuse(path, said)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("run.sh", "echo")
    refuse(path, "NumPy file with no arrays")


def test_what_lies_beside_the_tracks_is_not_read(tmp_path):
    trace, path = tmp_path / "called", tmp_path / "t.npz"
    beside = {"caption": "a dog", "masks": np.array([Calls(trace)], dtype=object), "empty": np.zeros(0)}
    np.savez(path, tracks=np.cumsum(np.ones((20, 2, 2)), 0), **beside)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("video.npy", npy_bytes((81, 10**4, 10**4, 3), "|u1"))
    assert read_tracks(path, drawn_size=SIZE).tracks[1].points[-1].tolist() == [20, 20]
    np.savez(path, tracks_XYZ=np.zeros((5, 2, 3)), images_jpeg_bytes=np.array([b"x"] * 5, object), visibility=True)
    refuse(path, r"tracks_XYZ float64 \(5, 2, 3\), images_jpeg_bytes object \(5,\), .*metres: project them with its")
    np.savez(path, tracks=np.cumsum(np.ones((20, 2, 2)), 0), visibility=np.array([Calls(trace)], dtype=object))
    refuse(path, "t.npz, visibility holds pickled Python objects")
    assert not trace.exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_visible_points_are_finite(tmp_path, bad):
    points = np.cumsum(np.ones((20, 2, 2)), 0)
    points[7, 1, 0] = bad
    np.savez(tmp_path / "t.npz", tracks=points)
    refuse(tmp_path / "t.npz", "track 1, point 7 must be finite")
    visible = np.ones((20, 2), bool)
    visible[7, 1] = False
    np.savez(tmp_path / "t.npz", tracks=points, visibility=visible)
    assert np.isfinite(read_tracks(tmp_path / "t.npz", drawn_size=SIZE).tracks[1].points).all()
    (tmp_path / "t.json").write_text(json.dumps([{"x": 1, "y": bad}]))
    refuse(tmp_path / "t.json", "track 0, point 0")


def test_large_counts_are_refused_with_the_way_to_thin_them_out(tmp_path):
    path = tmp_path / "t.npy"
    np.save(path, np.zeros((81, 5000, 2), np.float32) + 9)
    refuse(path, "5000 tracks, at most 4096 are accepted; draw fewer, or keep one in 2")
    refuse(path, r"5000 tracks, at most 256.*keep one in 20", max_tracks=256)
    np.save(path, np.zeros((81, 400, 2), np.float32) + 9)
    refuse(path, r"keep one in 2 \(imageconductor convert --every 2\)", max_tracks=256)
    np.save(path, np.zeros((10**7, 1, 2), np.float32) + 9)
    refuse(path, "10000000 points, at most 4096 are accepted; keep one in 2442")
    text = tmp_path / "t.txt"
    text.write_text("1,1\n" * 10**5)
    refuse(text, "100000 points, at most 4096")
    text.write_bytes(b"[" + b"[[1,1]]," * (10**7) + b"[[1,1]]]")
    refuse(text, "more than 32 MiB of text")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "not valid JSON"),
        ("[" * 500 + "]" * 500, "track 0, point 0 must be"),
        ('{"traj_key_points":' * 500 + "1" + "}" * 500, "expected a list of tracks"),
        ('[{"x": 1, "y": 2}, [3, 4]]', "track 0 must be a list"),
        ('[[{"x": 1, "y": 2}], []]', "track 1 must be a list"),
        ('[{"x": 1, "y": "2"}]', "track 0, point 0 must be"),
        ('[{"x": 1, "y": null}]', "track 0, point 0 must be"),
        ('[{"points": [{"x": 1, "y": 2}]}, {"points": []}]', "track 1 must be a list"),
        ('[{"points": [{"x": 1, "y": 2}]}, {"x": 1, "y": 2}]', "track 1 must be a list"),
        ('{"traj_key_points": [[[1, 2], [3]]]}', "track 0, point 1 must be"),
        ('{"1": {"trajectory": [[1, 2], 3]}}', "track 0, point 1 must be"),
        ('{"1": {"trajectory": []}}', "no points"),
        ('"' + "'" * 1000 + '"', "expected a list of tracks"),
        ("1,1\n2,2\n9e99,1\n", "track 0|not valid JSON"),
    ],
)
def test_ragged_and_deep_text(tmp_path, text, said):
    (tmp_path / "t.json").write_text(text)
    refuse(tmp_path / "t.json", said)


def test_folders_and_mixtures(tmp_path):
    with pytest.raises(ValueError, match=r"folder without \.txt files"):
        read_tracks(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npy: no such trajectory file"):
        read_tracks([tmp_path / "nowhere.npy"])
    (tmp_path / "a.txt").write_text("1,1\n")
    (tmp_path / "b.txt").write_text("[[[1, 1]]]")
    with pytest.raises(ValueError, match=r"several files are read as tora tracks"):
        read_tracks(tmp_path)
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match=r"b\.txt: not valid JSON"):
        read_tracks(tmp_path)
    with pytest.raises(ValueError, match="no trajectory file was given"):
        read_tracks([])


def test_damage_within_compressed_data_is_told(tmp_path):
    path = tmp_path / "tracks.npz"
    tracks = np.random.default_rng(0).normal(size=(64, 8, 2))
    np.savez_compressed(path, tracks=tracks, visibility=np.ones((64, 8), bool))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 60] = b"\xff" * 60
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged archive"):
        read_tracks(path, drawn_size=(64, 64))


def test_frames_in_the_place_of_tracks_are_seen_with_visibility_too(tmp_path):
    steps = np.random.default_rng(0).normal(0, 0.3, (9, 30, 2)).cumsum(1)
    tracks = steps + np.random.default_rng(1).uniform(0, 60, (9, 1, 2))
    np.savez(tmp_path / "tracks.npz", tracks=tracks, visibility=np.ones((9, 30), bool))
    with pytest.raises(ValueError, match="second axis seems to be the frames"):
        read_tracks(tmp_path / "tracks.npz", drawn_size=(80, 80))
    centres = np.stack([np.linspace([20, 20], [60, 40], 14), np.linspace([50, 70], [30, 60], 14)])
    corners = centres[:, :1] + [[-8, -6], [8, 6]]
    np.save(tmp_path / "traj.npy", np.concatenate([corners, centres], 1))  # boxes, as SG-I2V has them
    with pytest.raises(ValueError, match=r"second axis seems .*; a file of SG-I2V is converted by --from sg-i2v$"):
        read_tracks(tmp_path / "traj.npy", drawn_size=(80, 80))
    file = read_tracks(tmp_path / "traj.npy", drawn_size=(80, 80), format="sg-i2v")
    assert file.tracks[1].points.tolist() == centres[1].tolist()
