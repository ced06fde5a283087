"""Formats of videos: a method may make other sizes and numbers of frames than those that requests are drawn in.

A request is drawn once, in the evaluation's format. A method of another format gets the same picture and the same
motion in its own pixels and frames, and its videos are judged there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.interpolate import PchipInterpolator  # pyright: ignore[reportMissingTypeStubs]

from imageconductor.checkpoints.model_folder import locate_model, read_sampling_defaults
from imageconductor.conditioning import Trajectories, cover_crop
from imageconductor.conditioning.first_frame import cover_scale
from imageconductor.conditioning.trajectories import inside
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig, Method
from imageconductor.evaluation.drawn_motion.fixed_requests import FixedRequests
from imageconductor.evaluation.drawn_motion.requests import Request
from imageconductor.evaluation.scores import PAPER_DIAGONAL_PX

_PAPER_FORMAT = ((384, 256), 16)


@dataclass(frozen=True)
class VideoFormat:
    """Size and length of a method's videos, and how they answer requests that were drawn in another format.

    Attributes:
        size: (W, H).
        num_frames: T, frames of a video.
        fit: `crop` covers the size with the picture and cuts off what is left over; `resize` stretches the part of the
            picture that the evaluation's frame shows.
        frames: Numbers of the frames that stand for the evaluation's frames 0, 1, ...; None = all frames, spread evenly
            over the motion.
    """

    size: tuple[int, int]
    num_frames: int
    fit: Literal["crop", "resize"] = "crop"
    frames: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{self.size[0]}x{self.size[1]}x{self.num_frames}"

    @property
    def num_judged(self) -> int:
        """Number of frames that are judged: all, or those that stand for the evaluation's."""
        return self.num_frames if self.frames is None else len(self.frames)

    @property
    def scale(self) -> float:
        """Pixels at 384 x 256 that one pixel corresponds to, by the ratio of the diagonals."""
        return PAPER_DIAGONAL_PX / math.hypot(*self.size)

    def select_judged(self, video: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The frames of a video (T, H, W, 3) that are judged."""
        return video if self.frames is None else video[list(self.frames)]

    def check_against(self, drawn: VideoFormat) -> None:
        """Raises ValueError if the judged frames are not among its own, or more than the requests have."""
        if self.frames is not None and self.frames[-1] >= self.num_frames:
            raise ValueError(f"frames: there is no frame {self.frames[-1]} in a video of {self.num_frames} frames")
        if self.num_judged > drawn.num_frames and self.frames is not None:
            raise ValueError(f"frames: {self.num_judged} numbers stand for only {drawn.num_frames} frames of requests")


def resolve_formats(config: EvaluateConfig) -> tuple[VideoFormat, dict[str, VideoFormat]]:
    """The format in which requests are drawn, and that of each method's videos.

    A model is looked for where nothing but its own format says what is drawn.

    Raises:
        ValueError, FileNotFoundError: Such a model is missing, or models differ in their own format.
    """
    methods = config.all_methods
    drawn = _resolve_drawn(config, methods)
    formats = {}
    for name, method in methods.items():
        frames = None if method.frames is None else tuple(method.frames)
        size = drawn.size if method.size is None else (method.size[0], method.size[1])
        found = VideoFormat(size, method.num_frames or drawn.num_frames, method.fit, frames)
        try:
            found.check_against(drawn)
        except ValueError as error:
            raise ValueError(f"method {name}: {error}") from None
        formats[name] = found
    return drawn, formats


def fit_requests(
    requests: Sequence[Request], drawn: VideoFormat, wanted: VideoFormat, *, judged: bool
) -> list[Request]:
    """The same requests in another format.

    Args:
        requests: In the format `drawn`.
        drawn: Format in which requests are drawn.
        wanted: Format of a method.
        judged: Whether trajectories have a point for each frame that is judged, or for each frame of the video.

    Raises:
        ValueError: All tracks of a request begin outside the crop.
    """
    if (wanted.size, wanted.num_frames, wanted.frames) == (drawn.size, drawn.num_frames, None):
        return list(requests)
    times = _list_times(drawn, wanted, judged)
    images: dict[str, NDArray[np.uint8]] = {}
    fitted = []
    for request in requests:
        if request.source not in images:
            images[request.source] = _fit_image(request, wanted)
        tracks = _fit_tracks(_resample(request.trajectories, times), request, wanted)
        begins_inside = inside(tracks.points[:, 0], wanted.size)
        if request.trajectories.num_tracks and not begins_inside.any():
            raise ValueError(
                f"request {request.key}: no track begins inside the crop of {wanted.size[0]}x{wanted.size[1]}; "
                "take other points, or fit: resize"
            )
        tracks = Trajectories(
            tracks.points[begins_inside], tracks.visible[begins_inside], wanted.size, tracks.still[begins_inside]
        )
        points = torch.from_numpy(request.background)[:, None]
        background = Trajectories(points, torch.ones(points.shape[:2], dtype=torch.bool), drawn.size)
        background = _fit_tracks(background, request, wanted)
        kept = background.points[background.visible[:, 0], 0].numpy()
        colours = None if request.colours is None else request.colours[begins_inside.numpy()]
        own = {"image": images[request.source], "picture": None, "truth": None, "colours": colours}
        fitted.append(replace(request, trajectories=tracks, background=kept, **own))
    return fitted


def _resolve_drawn(config: EvaluateConfig, methods: dict[str, Method]) -> VideoFormat:
    """The settings' format, that of the fixed requests, or that which the models agree on."""
    size, num_frames = config.size, config.num_frames
    if config.fixed_requests is not None:
        fixed = FixedRequests.load(config.fixed_requests)
        for name, given, stated in (("size", size, fixed.size), ("num_frames", num_frames, fixed.num_frames)):
            if given is not None and given != stated:
                raise ValueError(
                    f"{config.fixed_requests} fixes {name} at {stated}, got {given}; set methods.NAME.{name}"
                )
        size, num_frames = fixed.size, fixed.num_frames
    if size is None or num_frames is None:
        shapes: dict[str, Any] = {}
        for name, method in methods.items():
            if method.model is not None and None in (method.size, method.num_frames):
                defaults = read_sampling_defaults(locate_model(method.model))
                shapes[name] = ((defaults["width"], defaults["height"]), defaults["num_frames"])
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the models make videos of different shapes, {shapes}: set size and num_frames")
        usual = next(iter(shapes.values()), _PAPER_FORMAT)
        size, num_frames = size or usual[0], num_frames or usual[1]
    return VideoFormat((size[0], size[1]), num_frames)


def _list_times(drawn: VideoFormat, wanted: VideoFormat, judged: bool) -> NDArray[np.float64]:
    """When the frames take place, counted in frames of the requests."""
    if wanted.frames is None:
        return np.linspace(0, drawn.num_frames - 1, wanted.num_frames)
    stand_for = np.arange(len(wanted.frames), dtype=np.float64)
    return stand_for if judged else np.interp(np.arange(wanted.num_frames), wanted.frames, stand_for)


def _resample(tracks: Trajectories, times: NDArray[np.float64]) -> Trajectories:
    """The tracks at other times, by PCHIP; between two frames a point is visible if it is in both of them."""
    before, after = np.floor(times).astype(int), np.ceil(times).astype(int)
    points = tracks.points.numpy()
    curve = PchipInterpolator(np.arange(tracks.num_frames), points, axis=1)
    exact = (before == after)[:, None]
    moved = np.where(exact, points[:, before], curve(times))
    return replace(tracks, points=torch.from_numpy(moved), visible=tracks.visible[:, before] & tracks.visible[:, after])


def _fit_tracks(tracks: Trajectories, request: Request, wanted: VideoFormat) -> Trajectories:
    if wanted.fit == "resize":
        return tracks.resize(wanted.size)
    return tracks.cover_crop(wanted.size, None if request.picture is None else request.picture.size)


def _fit_image(request: Request, wanted: VideoFormat) -> NDArray[np.uint8]:
    """The first frame (H, W, 3), resampled once from the picture that the request's own was made of."""
    frame = Image.fromarray(request.image)
    picture = request.picture or frame
    if wanted.fit == "crop":
        return np.array(cover_crop(picture, wanted.size))
    scale = cover_scale(picture.size, frame.size)
    shown = (frame.width / scale, frame.height / scale)
    left, top = ((whole - part) / 2 for whole, part in zip(picture.size, shown, strict=True))
    box = (max(left, 0), max(top, 0), min(left + shown[0], picture.width), min(top + shown[1], picture.height))
    return np.array(picture.resize(wanted.size, Image.Resampling.BICUBIC, box=box))
