"""Finished videos as a folder of files, and what is measured of them."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from imageconductor.apps.engine import Made
from imageconductor.conditioning import Boxes, Trajectories
from imageconductor.data.trackers import LucasKanadeTracker
from imageconductor.evaluation.drawn_motion.requests import select_background
from imageconductor.evaluation.metrics.motion import background_displacement
from imageconductor.files import atomic_folder, read_text, write_text
from imageconductor.sampling.job import SampleJob
from imageconductor.sampling.job_files import write
from imageconductor.sampling.video import Frames, upscale_for_viewing

_LATENTS = "latents.safetensors"
_ALL = "all.zip"


@dataclass(frozen=True)
class Result:
    """A finished request, whose videos and latents are files.

    Attributes:
        number: Counts the results of a visit, from 1.
        folder: `run.yaml`, the videos and what else a run of `sample.py` writes, a GIF of each video, and latents.
        job: With the model's defaults.
        title: One line for lists.
        seconds: That it took.
        note: Why `sample.py --config run.yaml` makes other videos; empty if it repeats them.
        displacement: Measured background displacement of each video, one line of text.
        drawing: As the visitor drew it, for editing; None = nothing was drawn.
        cropped: Of which tracks and boxes the video shows nothing, a line for each; tracks count from 0.
    """

    number: int
    folder: Path
    job: SampleJob
    title: str
    seconds: float
    note: str = ""
    displacement: list[str] = field(default_factory=list)
    drawing: dict | None = None
    cropped: list[str] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        """One for each video."""
        return self.job.seeds

    def find(self, kind: str, seed: int) -> Path | None:
        """The file of a video by its kind: video.mp4, overlay.mp4 or video.gif."""
        stem, suffix = kind.rsplit(".", 1)
        overlay = self.folder / f"overlay-{seed}.{suffix}"
        if stem == "overlay":
            return overlay if overlay.exists() else None
        plain = sorted(path for path in self.folder.glob(f"*-{seed}.{suffix}") if path != overlay)
        return plain[0] if plain else None

    def file(self, name: str) -> Path | None:
        """A file of the folder, if it is there."""
        path = self.folder / name
        return path if path.exists() else None

    def latents(self, step: int) -> dict[int, Tensor]:
        """The sample (B, C, T, h, w) before each of the steps up to step k, by its number.

        Raises:
            ValueError: There is none of step k.
        """
        path, found = self.folder / _LATENTS, {}
        if path.exists():
            with safe_open(path, "pt") as file:
                found = {int(name): file.get_tensor(name) for name in file.keys() if int(name) <= step}  # noqa: SIM118
        if step in found:
            return found
        raise ValueError(f"result {self.number} keeps no state before step {step}")

    def remove(self) -> None:
        """Deletes the files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def store(
    made: Made, number: int, folder: Path, note: str = "", drawing: dict | None = None, cropped: Sequence[str] = ()
) -> Result:
    """Writes the files of a finished request into a new folder.

    Args:
        made: From the engine.
        number: Of the result within its visit.
        folder: New.
        note: Why the job alone does not repeat the videos; empty if it does.
        drawing: As the visitor drew it.
        cropped: As in `Result`.
    """
    job, trajectories = made.inputs.job, made.inputs.trajectories
    with atomic_folder(folder) as part:
        write(made.inputs, made.videos, part)
        if note:
            repeat = part / "run.yaml"
            write_text(repeat, f"# The settings of these videos; it does not repeat them: {note}\n{read_text(repeat)}")
        for seed, video in zip(job.seeds, made.videos, strict=True):
            write_gif(part / f"video-{seed}.gif", video, cast(int, job.fps))
        with zipfile.ZipFile(part / _ALL, "w") as archive:  # of compressed files
            for path in sorted(part.iterdir()):
                if path.name != _ALL:
                    archive.write(path, path.name)
        if made.latents:
            kept = {str(step): sample.contiguous() for step, sample in made.latents.items()}
            save_file(kept, part / _LATENTS)
    boxes = made.inputs.boxes
    displacement = []
    if trajectories.num_tracks:
        displacement = [measure_background(video, trajectories, boxes) for video in made.videos]
    has_boxes = boxes is not None and boxes.num_objects > 0
    drawn = [str(job.control)] * (trajectories.num_tracks > 0) + ["boxes"] * has_boxes
    what = " and ".join(drawn) or "no drawing"
    title = f"{number}: {what}, seed {', '.join(map(str, job.seeds))}" + (f", {job.prompt[:40]}" if job.prompt else "")
    return Result(number, folder, job, title, made.seconds, note, displacement, drawing, list(cropped))


def write_gif(path: Path, frames: Frames, fps: int) -> None:
    """An endless animation of a video (T, H, W, 3); one palette for all frames keeps still parts from flickering."""
    large, _ = upscale_for_viewing(frames)
    pictures = [Image.fromarray(frame) for frame in large]
    palette = Image.fromarray(np.concatenate(list(frames))).quantize(256, dither=Image.Dither.NONE)
    # GIF counts in hundredths of a second.
    indexed = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    duration = max(20, round(100 / fps) * 10)
    indexed[0].save(path, save_all=True, append_images=indexed[1:], duration=duration, loop=0, optimize=False)


def measure_background(video: Frames, trajectories: Trajectories, boxes: Boxes | None = None) -> str:
    """How far the background moved, in words: the median over points of a grid away from what is drawn.

    Args:
        video: (T, H, W, 3) uint8.
        trajectories: Drawn tracks in pixels of the video.
        boxes: Drawn boxes in pixels of the video, whose objects move by themselves.
    """
    height, width = video.shape[1:3]
    drawn = trajectories.control
    # Tracks of the camera lie on the background; those of objects, and those that do not say, on objects.
    on_objects = [n for n in range(trajectories.num_tracks) if drawn is None or drawn[n] != 0]
    points = select_background((width, height), [trajectories.points[n].numpy() for n in on_objects])
    if boxes is not None:
        points = _keep_outside(points, boxes, min(width, height) / 5)  # as far as from the tracks
    if not len(points):
        return "background displacement: the drawing covers the picture"
    tracked, followed = LucasKanadeTracker().track(video, points)
    moved = background_displacement(tracked, followed)
    count = int(followed[:, 1].sum()) if len(video) > 1 else 0
    if not np.isfinite(moved):
        return "background displacement: no point of the background could be followed"
    return f"background displacement: {moved:.1f} px (median of {count} points, video {width} x {height})"


def _keep_outside(points: NDArray[np.float64], boxes: Boxes, margin: float) -> NDArray[np.float64]:
    """Points (M, 2) that are farther than `margin` pixels from the boxes of all objects and frames."""
    sides = boxes.xyxy[boxes.present].numpy() - 0.5  # counted as points are
    beyond = np.maximum(sides[:, None, :2] - points, points - sides[:, None, 2:]).clip(min=0)
    return points[(np.linalg.norm(beyond, axis=-1) > margin).all(axis=0)]
