"""Requests and videos in formats of other methods: sizes, lengths, frames, and the files that are handed out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from footage import texture
from PIL import Image

from imageconductor import config as config_file
from imageconductor.commands.evaluate import main
from imageconductor.conditioning import Trajectories, cover_crop, load_image
from imageconductor.data.trackers import LucasKanadeTracker
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig, Method, Task
from imageconductor.evaluation.drawn_motion.protocol import Evaluation
from imageconductor.evaluation.drawn_motion.report import format_markdown
from imageconductor.evaluation.drawn_motion.requests import Request, build_requests
from imageconductor.evaluation.drawn_motion.scores import measure
from imageconductor.evaluation.drawn_motion.video_format import VideoFormat, fit_requests, resolve_formats
from imageconductor.evaluation.video_files import read_video
from imageconductor.sampling.video import upscale_for_viewing, write_mp4

DRAWN = VideoFormat((384, 256), 16)
DRAGNUWA = "{videos: %s, size: [576, 320], num_frames: 14}"


def request_at(points, picture: Image.Image, num_frames: int = 16) -> Request:
    """A request whose points (N, 2) move right by 2 px a frame."""
    shift = torch.arange(num_frames, dtype=torch.float64)[:, None] * torch.tensor([2.0, 0.0])
    tracks = torch.as_tensor(points, dtype=torch.float64)[:, None] + shift
    drawn = Trajectories(tracks, torch.ones(tracks.shape[:2], dtype=torch.bool), DRAWN.size)
    image = np.asarray(cover_crop(picture, DRAWN.size))
    return Request("a", image, "", drawn, np.array([[5.0, 2.0], [191.5, 127.5]]), 0, "a", picture=picture)


def test_a_crop_and_a_stretch_by_hand():
    request = request_at([[100.0, 100.0]], Image.new("RGB", (768, 512)))
    (cropped,) = fit_requests([request], DRAWN, VideoFormat((576, 320), 16), judged=True)
    # 1.5 times larger, 32 of 384 rows are cut off above: 1.5 * 100.5 - 0.5 and 1.5 * 100.5 - 32 - 0.5.
    assert cropped.trajectories.points[0, 0].tolist() == pytest.approx([150.25, 118.25])
    assert cropped.trajectories.points[0, 15].tolist() == pytest.approx([195.25, 118.25])
    assert cropped.background.tolist() == [pytest.approx([287.5, 159.5])], "the other one is cut off"
    assert cropped.image.shape == (320, 576, 3)
    (stretched,) = fit_requests([request], DRAWN, VideoFormat((576, 320), 16, "resize"), judged=True)
    assert stretched.trajectories.points[0, 0].tolist() == pytest.approx([150.25, 125.125])
    assert len(stretched.background) == 2
    with pytest.raises(ValueError, match="request a: no track begins inside the crop of 576x320"):
        fit_requests(
            [request_at([[5.0, 2.0]], Image.new("RGB", (768, 512)))], DRAWN, VideoFormat((576, 320), 16), judged=True
        )


@pytest.mark.parametrize("fit", ["crop", "resize"])
@pytest.mark.parametrize("picture_size", [(900, 500), (500, 700)])
def test_points_stay_on_what_they_point_at(fit, picture_size):
    """A blob of the picture, and a track that begins on it, in both frames."""
    x, y = np.meshgrid(np.arange(picture_size[0]), np.arange(picture_size[1]))
    at = (0.6 * picture_size[0], 0.45 * picture_size[1])
    blob = np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 2 / 12**2)
    picture = Image.fromarray(np.repeat((255 * blob).astype(np.uint8)[..., None], 3, axis=2))

    def centre(image):
        weights = image[..., 0].astype(float)
        rows, columns = np.indices(weights.shape)
        return [(columns * weights).sum() / weights.sum(), (rows * weights).sum() / weights.sum()]

    request = request_at([centre(np.asarray(cover_crop(picture, DRAWN.size)))], picture)
    (fitted,) = fit_requests([request], DRAWN, VideoFormat((576, 320), 16, fit), judged=True)
    assert fitted.trajectories.points[0, 0].tolist() == pytest.approx(centre(fitted.image), abs=0.1)


def test_frames_that_stand_for_ours():
    request = request_at([[100.0, 100.0]], Image.new("RGB", (384, 256)))

    def positions(wanted, judged):
        (fitted,) = fit_requests([request], DRAWN, wanted, judged=judged)
        return (fitted.trajectories.points[0, :, 0] - 100).numpy() / 2

    np.testing.assert_allclose(positions(VideoFormat((384, 256), 14), True), np.linspace(0, 15, 14), atol=1e-9)
    every_third = VideoFormat((384, 256), 49, frames=tuple(range(0, 48, 3)))
    np.testing.assert_allclose(positions(every_third, True), np.arange(16))
    exported = positions(every_third, False)
    np.testing.assert_allclose(exported[:46], np.arange(46) / 3, atol=1e-9)
    np.testing.assert_allclose(exported[46:], 15, err_msg="the motion is over")
    numbers = every_third.select_judged(np.arange(49, dtype=np.uint8)[:, None, None, None])
    assert numbers.ravel().tolist() == list(range(0, 48, 3))
    first_half = VideoFormat((384, 256), 8, frames=tuple(range(8)))
    np.testing.assert_allclose(positions(first_half, True), np.arange(8))
    assert every_third.num_judged == 16


def test_hidden_points_stay_hidden_between_frames():
    request = request_at([[100.0, 100.0]], Image.new("RGB", (384, 256)))
    request.trajectories.visible[0, 8] = False
    (fitted,) = fit_requests([request], DRAWN, VideoFormat((384, 256), 31), judged=True)
    assert (~fitted.trajectories.visible[0]).nonzero().ravel().tolist() == [15, 16, 17]


def test_formats_that_cannot_be():
    for settings, match in (
        ({"size": (0, 320)}, "size must be positive"),
        ({"num_frames": 1}, "num_frames must be at least 2"),
        ({"frames": [3, 3]}, "frames must be two or more numbers from 0 on that rise"),
    ):
        with pytest.raises(ValueError, match=match):
            Method(videos="x", **settings)
    for method, match in (
        (Method(videos="x", num_frames=14, frames=[0, 14]), "method x: frames: there is no frame 14 in a video of 14"),
        (Method(videos="x", num_frames=17, frames=[*range(17)]), "17 numbers stand for only 16 frames"),
    ):
        with pytest.raises(ValueError, match=match):
            resolve_formats(EvaluateConfig(methods={"x": method}))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(texture(3, (900, 600), 0)).save(folder / "a.png")
    (folder / "a.json").write_text('{"caption": "Wellen auf See, naïve", "objects": [[300, 310]]}')
    return folder


def answer(requests: Path, videos: Path, share: float = 1) -> Path:
    """What a program would make of exported requests that moves the picture by a share of what the first track asks."""
    for folder in requests.iterdir():
        for key, request in json.loads((folder / "requests.json").read_text())["requests"].items():
            picture = np.asarray(load_image(folder / f"{key}.png"))
            tracks = json.loads((folder / f"{key}.json").read_text())["tracks"]
            points = np.array(tracks[0]["points"])
            frames = [
                cv2.warpAffine(
                    picture,
                    np.float64([[1, 0, dx], [0, 1, dy]]),
                    picture.shape[1::-1],
                    flags=cv2.INTER_CUBIC,
                    borderMode=cv2.BORDER_REPLICATE,
                )
                for dx, dy in share * (points - points[0])
            ]
            (videos / folder.name).mkdir(parents=True, exist_ok=True)
            write_mp4(videos / folder.name / f"{key}.mp4", np.stack(frames), 8)
            assert request["prompt"] == "Wellen auf See, naïve"
    return videos


@pytest.mark.slow
def test_methods_of_other_formats_are_judged_in_their_own_frame(images, tmp_path, capsys):
    methods = "methods={" + f"ours: {{videos: {tmp_path / 'ours'}}}, half: {DRAGNUWA % (tmp_path / 'half')}" + "}"
    settings = [methods, f"images={images}", "camera_presets=[pan-left]", "object_presets=[line-up]", "seed=7"]
    settings += ["device=cpu"]
    assert main(["export-requests", *settings, "--output", str(tmp_path / "requests")]) == 0
    record = json.loads((tmp_path / "requests" / "half" / "object" / "requests.json").read_text())
    assert (record["size"], record["num_frames"]) == ([576, 320], 14)
    assert record["requests"]["a_line-up"]["seed"] == 7
    assert load_image(tmp_path / "requests" / "half" / "object" / "a_line-up.png").size == (576, 320)
    assert main(["export-requests", *settings, "--output", str(tmp_path / "requests")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err

    answer(tmp_path / "requests" / "ours", tmp_path / "ours")
    answer(tmp_path / "requests" / "half", tmp_path / "half", 0.5)
    record = Evaluation(config_file.load(EvaluateConfig, None, settings), tmp_path / "out").run()
    assert record is not None
    ours, half = (record["methods"][name] for name in ("ours", "half"))
    # The motion reaches 0.225 * 256 * 1.5 px; half of it is lacking, on average over 13 of 14 frames.
    lacking = 0.225 * 256 * 1.5 / 2 * 7 / 13
    for task in ("camera", "object"):
        assert ours["tasks"][task]["error"]["mean"] < 0.3
        assert half["tasks"][task]["error"]["mean"] == pytest.approx(lacking, abs=0.4)
        percent = 100 * lacking / np.hypot(576, 320)
        assert half["tasks"][task]["error_percent_of_diagonal"]["mean"] == pytest.approx(percent, abs=0.06)
    assert "error" not in half["differences"]["camera"], "a pixel of one is not a pixel of the other"
    difference = lacking * np.hypot(384, 256) / np.hypot(576, 320)
    assert half["differences"]["camera"]["error_384x256"]["mean"] == pytest.approx(difference, abs=0.4)
    table = format_markdown(record)
    assert "\n| ours | 384x256x16 | " in table
    assert "\n| half | 576x320x14 | " in table


def test_requests_of_a_model_that_is_not_there_yet(images, tmp_path, capsys):
    command = ["export-requests", "model=later", f"images={images}", "camera_presets=[roll]"]
    command += ["object_presets=[arc]", "--output", str(tmp_path / "requests")]
    assert main([*command, "num_frames=8"]) == 2
    assert "no model folder at later" in capsys.readouterr().err
    assert main([*command, "num_frames=8", "size=[96,64]"]) == 0
    assert (tmp_path / "requests" / "later" / "camera" / "requests.json").is_file()


def test_another_request_is_measured_again(images, write_videos, tmp_path):
    """Scores are of a video and of what it was asked for: here a still video, which lacks all of the motion."""
    shutil.copytree(images, tmp_path / "images")
    settings = {"images": str(tmp_path / "images"), "object_presets": ["line-up"], "size": (96, 64), "num_frames": 8}
    config = EvaluateConfig(videos=str(tmp_path / "still"), tasks={"object": Task()}, device="cpu", **settings)
    write_videos(tmp_path / "still", config, lambda request: np.repeat(request.image[None], 8, axis=0))
    path = tmp_path / "out" / "scores" / "still" / "object" / "a_line-up.json"

    def measure_again(changed):
        Evaluation(changed, tmp_path / "out").run()
        return json.loads(path.read_text())["error"], path.stat().st_mtime_ns

    (error, made), kept = measure_again(config), measure_again(config)
    assert kept == (error, made)
    stronger = replace(config, strength=1.1)
    another, remade = measure_again(stronger)
    assert another == pytest.approx(1.1 * error, rel=0.02)
    described = tmp_path / "images" / "a.json"
    described.write_text(described.read_text().replace("Wellen", "Boote"))
    assert measure_again(stronger)[1] > remade
    first = build_requests(config, "object", (96, 64), 8)[0]
    assert first.sha256 == replace(first, seed=9).sha256, "a seed changes the video, not how it is judged"


def test_a_larger_video_is_brought_to_the_size_asked_for(tmp_path):
    request = build_requests(EvaluateConfig(videos="x", motions="own", num_scenes=1), "camera", (64, 64), 16)[0]
    assert request.truth is not None
    write_mp4(tmp_path / "large.mp4", upscale_for_viewing(request.truth)[0], 8)
    back = read_video(tmp_path / "large.mp4", (64, 64), 16)
    assert np.abs(back.astype(float) - request.truth).mean() < 3


def test_a_video_of_another_length_is_an_error():
    request = build_requests(EvaluateConfig(videos="x", motions="own", num_scenes=1), "camera", (64, 64), 16)[0]
    assert request.truth is not None
    with pytest.raises(ValueError, match="expected a video of shape"):
        measure(request, request.truth[:-1], LucasKanadeTracker())
