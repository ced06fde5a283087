"""An evaluation: videos are made where they are missing, each is scored, and the scores become figures.

    OUTPUT/videos/ROW/ARM/KEY.mp4    what a model made, and KEY.json, what it was asked
    OUTPUT/scores/ROW/ARM/KEY.json   what was measured on one video
    OUTPUT/results.json              the figures

Every file appears whole, so a run that was killed goes on where it stopped, and the processes of `accelerate launch`
share the work by the number of the request. Figures come from the files alone, for our videos as for those of others.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import imageio.v3 as iio
import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from PIL import Image

from imageconductor.evaluation import motion
from imageconductor.evaluation.appearance import ClipScorer, ssim
from imageconductor.evaluation.config import Arm, EvaluateConfig, RequestSet, Row
from imageconductor.evaluation.frechet import frechet_distance
from imageconductor.evaluation.requests import Request, build_requests, reference_clips
from imageconductor.evaluation.trackers import CoTracker, LucasKanadeTracker, Tracker
from imageconductor.models.personalise import personalise
from imageconductor.sampling.job import parse_lora
from imageconductor.sampling.pipeline import ImageConductorPipeline, model_folder
from imageconductor.sampling.video import to_uint8, watchable, write_mp4

_PAPER_DIAGONAL_PX = math.hypot(384, 256)
_FPS = 8
_SAME_ASPECT = 0.02
# The single figures that the bundled model is judged by: name, arm, metric.
_NAMED = {
    "cam_mc": ("camera", "error"),
    "cam_mc_all_points": ("camera", "error_all_points"),
    "cam_mc_still": ("camera", "still"),
    "cam_mc_uncontrolled": ("camera_uncontrolled", "error"),
    "obj_mc": ("object", "error"),
    "obj_mc_all_points": ("object", "error_all_points"),
    "obj_mc_still": ("object", "still"),
    "obj_mc_uncontrolled": ("object_uncontrolled", "error"),
    "leak_object": ("object", "leak"),
    "leak_camera": ("object_as_camera", "leak"),
    "leak_base": ("object_as_base", "leak"),
    "leak_uncontrolled": ("object_uncontrolled", "leak"),
}

Progress = Callable[[Sequence[Any], str], Any]


class Evaluation:
    """One evaluation and its folder.

    Args:
        config: What is measured.
        output: Folder to write, new or of the same evaluation.
        progress: Wraps a list of jobs under a title, e.g. in a bar.

    Raises:
        ValueError, FileNotFoundError: In one line, whatever can be known to be wrong before the first video is made.
    """

    def __init__(self, config: EvaluateConfig, output: Path, progress: Progress | None = None):
        self.config, self.output = config, output
        self.state = PartialState()
        self.progress: Progress = progress or (lambda jobs, _: jobs)
        if output.exists() and any(output.iterdir()) and not (output / "scores").is_dir():
            raise ValueError(f"{output} exists and holds something else; name another --output")
        self.size, self.num_frames = self._shape()
        kinds: set[RequestSet] = {arm.requests for arm in config.arms.values()}
        self.requests = {kind: build_requests(config, kind, self.size, self.num_frames) for kind in sorted(kinds)}
        for name, row in config.table.items():
            if row.videos is not None:
                self._check_videos(name, row)
        self._check_comparison()
        self.device = config.device or str(self.state.device)
        self.clip = ClipScorer(config.clip, self.device) if config.clip is not None else None
        self.tracker: Tracker = LucasKanadeTracker()
        if config.tracker == "cotracker":
            self.tracker = CoTracker(config.cotracker, device=self.device)
        (output / "scores").mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, Any] | None:
        """Makes what is missing, scores it, and returns the record of results.json; None but in the first process."""
        for name, row in self.config.table.items():
            if row.model is not None:
                self._claim(name, row)
                self._generate(name, row)
        self.state.wait_for_everyone()
        for name, row in self.config.table.items():
            if row.videos is not None:
                self._check_first_frames(name, row)
            self._score(name, row)
        self.state.wait_for_everyone()
        return self._record() if self.state.is_main_process else None

    def video_path(self, name: str, row: Row, arm: str, request: Request) -> Path:
        """Where a video lies, ours or another's."""
        root = Path(row.videos) if row.videos is not None else self.output / "videos" / name
        return root / arm / f"{request.key}.mp4"

    def read(self, path: Path) -> NDArray[np.uint8]:
        """Frames (T, H, W, 3) of the size that is asked for; see `read_video`."""
        return read_video(path, self.size, self.num_frames)

    def clip_scores(self, name: str, arm: str) -> list[dict[str, Any]]:
        """What was measured on each video of an arm, in the order of the requests."""
        folder = self.output / "scores" / name / arm
        kind = self.config.arms[arm].requests
        return [json.loads((folder / f"{request.key}.json").read_text()) for request in self.requests[kind]]

    # -- before anything is made

    def _shape(self) -> tuple[tuple[int, int], int]:
        sizes = {}
        for name, row in self.config.table.items():
            if row.model is None:
                continue
            folder = model_folder(row.model)
            for arm in self.config.arms.values():
                if arm.control in ("camera", "object", "mixed"):
                    ImageConductorPipeline.check_adapters(folder, arm.control)
            for file in (row.base, *(parse_lora(text)[0] for text in (*row.lora, *row.motion_lora))):
                if file is not None and not Path(file).is_file():
                    raise FileNotFoundError(f"row {name}: no file at {file}")
            defaults = ImageConductorPipeline.read_sampling_defaults(folder)
            sizes[name] = ((defaults["width"], defaults["height"]), defaults["num_frames"])
        if len(set(sizes.values())) > 1 and None in (self.config.size, self.config.num_frames):
            raise ValueError(f"the models make videos of different shapes, {sizes}: set size and num_frames")
        size, num_frames = next(iter(sizes.values()), ((384, 256), 16))
        width, height = self.config.size or size
        return (width, height), self.config.num_frames or num_frames

    def _check_videos(self, name: str, row: Row) -> None:
        expected = [
            self.video_path(name, row, arm, request)
            for arm, asked in self.config.arms.items()
            for request in self.requests[asked.requests]
        ]
        if missing := [path for path in expected if not path.is_file()]:
            raise FileNotFoundError(
                f"row {name} lacks {len(missing)} of {len(expected)} videos, the first one is {missing[0]}; "
                "an evaluation of a model writes videos/ROW/ARM/KEY.mp4: use the same names"
            )

    def _check_comparison(self) -> None:
        """What is needed to judge the frames: torchmetrics, the networks' files, the reference videos."""
        ssim(np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8))
        for name in self.config.frechet:
            weights = getattr(self.config, f"{name}_weights", None)
            if weights is not None and not Path(weights).is_file():
                raise FileNotFoundError(f"{name}_weights: no file at {weights}; docs/reproduce.md says where to get it")
        if self.config.frechet and self.config.reference is not None and not self._reference_paths():
            raise FileNotFoundError(f"reference: no mp4 file in {self.config.reference}")

    def _check_first_frames(self, name: str, row: Row) -> None:
        """Refuses videos that begin with another request's picture: their names are mixed up."""
        for arm, asked in self.config.arms.items():
            requests = self.requests[asked.requests]
            small = np.stack([_thumbnail(request.image) for request in requests])
            for request, own in zip(requests, small, strict=True):
                path = self.video_path(name, row, arm, request)
                distances = np.abs(small - _thumbnail(self.read(path)[0])).mean(axis=(1, 2, 3))
                nearest = int(distances.argmin())
                if 2 * distances[nearest] + 0.02 < np.abs(own - _thumbnail(self.read(path)[0])).mean():
                    raise ValueError(
                        f"row {name}: {path} begins with the picture of {requests[nearest].key}, not of {request.key}; "
                        "are the names mixed up?"
                    )

    def _claim(self, name: str, row: Row) -> None:
        """Refuses to go on with videos that were made with other settings."""
        config = self.config
        weights = {
            str(path): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(model_folder(row.model or "").rglob("*.safetensors"))
        }
        keys = ("images", "motions", "strength", "world_seed", "num_points", "seed", "num_inference_steps", "dtype")
        settings = {key: getattr(config, key) for key in (*keys, "guidance_scale")}
        settings |= {"size": self.size, "num_frames": self.num_frames, "row": asdict(row), "weights": weights}
        if config.motions == "presets":  # Seeds count the requests.
            settings |= {"presets": [config.camera_presets, config.object_presets]}
            settings |= {"keys": [r.key for r in next(iter(self.requests.values()))] if config.images else None}
        text = json.dumps(settings, indent=1, default=str)
        record = self.output / "videos" / name / "made_with.json"
        if record.exists() and record.read_text() != text:
            old, new = json.loads(record.read_text()), json.loads(text)
            changed = ", ".join(key for key in new if old.get(key) != new[key])
            raise ValueError(f"{record.parent} was made with other settings ({changed}); name another --output")
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            _write(record, text)

    # -- videos

    def _generate(self, name: str, row: Row) -> None:
        jobs = list(self._missing(name, row))
        if not jobs:
            return
        pipe = self._pipeline(row)
        for arm_name, arm, batch in self.progress(jobs, f"{name}: videos"):
            started = time.perf_counter()
            frames = self._sample(pipe, arm, batch)
            seconds = (time.perf_counter() - started) / len(batch)
            for request, video in zip(batch, frames, strict=True):
                path = self.video_path(name, row, arm_name, request)
                asked = {"prompt": request.prompt, "seed": request.seed, **asdict(arm), "seconds": round(seconds, 3)}
                asked["batch"] = len(batch)
                _write(path.with_suffix(".json"), json.dumps(asked, indent=1))
                temporary = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
                write_mp4(temporary, watchable(video)[0], _FPS)
                temporary.rename(path)

    def _missing(self, name: str, row: Row) -> Iterator[tuple[str, Arm, list[Request]]]:
        for arm_name, arm in self.config.arms.items():
            mine = self.requests[arm.requests][self.state.process_index :: self.state.num_processes]
            todo = iter([r for r in mine if not self.video_path(name, row, arm_name, r).exists()])
            while batch := list(islice(todo, self.config.batch_size)):
                yield arm_name, arm, batch

    def _pipeline(self, row: Row) -> ImageConductorPipeline:
        name = self.config.dtype or ("float16" if self.device.startswith("cuda") else "float32")
        pipe = ImageConductorPipeline.from_pretrained(model_folder(row.model or ""), torch_dtype=getattr(torch, name))
        loras, motion_loras = ([parse_lora(text) for text in texts] for texts in (row.lora, row.motion_lora))
        personalise(pipe, row.base, loras, motion_loras, None)
        pipe.to(self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _sample(self, pipe: ImageConductorPipeline, arm: Arm, batch: list[Request]) -> NDArray[np.uint8]:
        controlled = arm.control != "none"
        width, height = self.size
        output: Any = pipe(
            image=[Image.fromarray(request.image) for request in batch],
            trajectories=[request.trajectories for request in batch] if controlled else None,
            prompt=[request.prompt for request in batch],
            control=arm.control if controlled else None,
            camera_free_scale=arm.camera_free_scale,
            guidance_scale=self.config.guidance_scale,
            num_inference_steps=self.config.num_inference_steps,
            num_frames=self.num_frames,
            width=width,
            height=height,
            generator=[torch.Generator().manual_seed(request.seed) for request in batch],
            output_type="np",
        )
        return to_uint8(output.frames)

    # -- scores

    def _score(self, name: str, row: Row) -> None:
        instrument = f"{self.tracker.name} {self.tracker.version}"
        jobs = []
        for arm_name, arm in self.config.arms.items():
            for request in self.requests[arm.requests][self.state.process_index :: self.state.num_processes]:
                path = self.video_path(name, row, arm_name, request)
                stat = path.stat()
                made = {
                    "tracker": instrument,
                    "clip": self.config.clip,
                    "video": [str(path.resolve()), stat.st_size, stat.st_mtime_ns],
                }
                target = self.output / "scores" / name / arm_name / f"{request.key}.json"
                if not target.exists() or json.loads(target.read_text()).get("made_with") != made:
                    jobs.append((path, target, request, made))
        for path, target, request, made in self.progress(jobs, f"{name}: scores"):
            score = measure(request, self.read(path), self.tracker, self.clip)
            beside = path.with_suffix(".json")
            if row.model is not None and beside.exists():
                score["seconds"] = json.loads(beside.read_text())["seconds"]
            _write(target, json.dumps({"key": request.key, **_plain(score), "made_with": made}))

    # -- figures

    def _record(self) -> dict[str, Any]:
        scale = _PAPER_DIAGONAL_PX / math.hypot(*self.size)
        rows: dict[str, Any] = {}
        for name, row in self.config.table.items():
            arms = {arm: figures(self.clip_scores(name, arm), scale) for arm in self.config.arms}
            rows[name] = {**asdict(row), "arms": arms, "frechet": self._frechet(name, row)}
        first = next(iter(rows.values()))["arms"]
        named = {key: first[arm][metric] for key, (arm, metric) in _NAMED.items() if arm in first}
        if both := [arm for arm in ("camera", "object") if arm in first]:
            name = next(iter(rows))
            scores = [score for arm in both for score in self.clip_scores(name, arm)]
            for metric in ("first_frame_psnr", "first_frame_ssim", "coverage"):
                named[metric] = asdict(motion.summarise([_number(score[metric]) for score in scores]))
        for arm in first:
            if arm.startswith("object_free_"):
                named[f"leak_{arm}"], named[f"obj_mc_{arm}"] = first[arm]["leak"], first[arm]["error"]
        own = self._own_scores()
        return _plain(
            {
                **{key: figure["mean"] for key, figure in named.items()},
                "intervals": named,
                "rows": rows,
                "tracker_on_the_true_clips": own,
                "settings": {
                    **asdict(self.config),
                    "size": self.size,
                    "num_frames": self.num_frames,
                    "tracker": f"{self.tracker.name} {self.tracker.version}",
                    "px_at_384x256_per_px": scale,
                },
            }
        )

    def _own_scores(self) -> dict[str, Any]:
        """What the instrument says of the clips themselves, where they are known."""
        scored: dict[str, Any] = {}
        for kind, requests in self.requests.items():
            truths = [(r, r.truth) for r in requests if r.truth is not None]
            scores = [measure(request, truth, self.tracker, None) for request, truth in truths]
            for metric in ("error", "leak", "coverage") if scores else ():
                scored[f"{kind}_{metric}"] = asdict(motion.summarise([score[metric] for score in scores]))
        return scored

    def _frechet(self, name: str, row: Row) -> dict[str, Any]:
        config = self.config
        found: dict[str, Any] = {}
        for distance in config.frechet:
            paths = [
                self.video_path(name, row, arm, request)
                for arm in config.frechet_arms
                for request in self.requests[config.arms[arm].requests]
            ]
            weights = {"fid": config.fid_weights, "fvd": config.fvd_weights}.get(distance)
            measured = frechet_distance(
                distance,
                (self.read(path) for path in paths),
                self._reference(),
                None if weights is None else Path(weights),
                num_frames=self.num_frames,
                device=self.device,
            )
            record = {**measured.record(), "reference": config.reference or "sprite world"}
            found[distance] = {**record, "reference_stride": config.reference_stride if config.reference else 1}
        return found

    def _reference(self) -> Iterator[NDArray[np.uint8]]:
        config = self.config
        if config.reference is None:
            yield from reference_clips(config, self.size, self.num_frames)
            return
        needed = (self.num_frames - 1) * config.reference_stride + 1
        for path in self._reference_paths():
            frames = list(islice(iio.imiter(path, plugin="FFMPEG"), needed))[:: config.reference_stride]
            if len(frames) < self.num_frames:
                raise ValueError(
                    f"{path} has fewer than the {needed} frames that are needed; take it out of the folder"
                )
            yield np.stack([_cover(frame, self.size) for frame in frames])

    def _reference_paths(self) -> list[Path]:
        return sorted(Path(self.config.reference or "").rglob("*.mp4"))[: self.config.num_reference]


def measure(
    request: Request, video: NDArray[np.uint8], tracker: Tracker, clip: ClipScorer | None = None
) -> dict[str, Any]:
    """Metrics of one video, or of the clip itself to learn the tracker's own error.

    Returns:
        error, error_all_points, still, leak: pixels; coverage, background_coverage: shares; first_frame_psnr (dB),
        first_frame_ssim; clip_text, clip_consistency if there is a scorer; tracked (N, T, 2) and followed (N, T) lists.

    Raises:
        ValueError: The video has another shape than what was asked for.
    """
    expected = (request.trajectories.num_frames, *request.image.shape)
    if video.shape != expected:
        raise ValueError(f"{request.key}: expected a video of shape {expected}, got {video.shape}")
    wanted = request.trajectories.points.numpy()
    visible = request.trajectories.visible.numpy()
    tracked, followed = tracker.track(video, wanted[:, 0])
    rest, rest_followed = tracker.track(video, request.background)
    score: dict[str, Any] = {
        "error": motion.trajectory_error(wanted, tracked, visible & followed),
        "error_all_points": motion.trajectory_error(wanted, tracked, visible),
        "still": motion.still_error(wanted, visible),
        "leak": motion.displacement(rest, rest_followed),
        "coverage": motion.coverage(followed, visible),
        "background_coverage": motion.coverage(rest_followed, np.ones_like(rest_followed)),
        "first_frame_psnr": motion.psnr(video[0] / 255, request.image / 255),
        "first_frame_ssim": ssim(video[0], request.image),
    }
    if clip is not None:
        score["clip_text"], score["clip_consistency"] = clip(video, request.prompt)
    return {**score, "tracked": np.round(tracked, 2).tolist(), "followed": followed.tolist()}


def figures(scores: Sequence[Mapping[str, Any]], scale: float) -> dict[str, dict[str, float]]:
    """Mean over the videos of an arm and its interval, for each metric.

    Args:
        scores: One a video.
        scale: From pixels of the videos to pixels at 384 x 256, by the diagonals.
    """
    found = {}
    for metric in scores[0]:
        if metric in ("key", "tracked", "followed", "made_with"):
            continue
        figure = asdict(motion.summarise([_number(score.get(metric)) for score in scores]))
        found[metric] = figure
        if metric in ("error", "error_all_points", "still", "leak"):
            share = {key: figure[key] * scale for key in ("mean", "low", "high")}
            found[f"{metric}_384x256"] = {**share, "n": figure["n"]}
            diagonal = {key: value / _PAPER_DIAGONAL_PX for key, value in share.items()}
            found[f"{metric}_of_diagonal"] = {**diagonal, "n": figure["n"]}
    return found


def read_video(path: Path, size: tuple[int, int], num_frames: int) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) of a file, resized to `size` if it has another one: by area if larger, else bicubic.

    Raises:
        ValueError: It cannot be read, is of another shape, or has not exactly `num_frames` frames.
    """
    try:
        frames = iio.imread(path, plugin="FFMPEG")
    except Exception as error:  # Whatever ffmpeg and its wrapper raise.
        raise ValueError(f"{path} cannot be read as a video: {str(error).strip().splitlines()[-1]}") from error
    if len(frames) != num_frames:
        raise ValueError(f"{path} has {len(frames)} frames, {num_frames} were asked for; a video is not cut to fit")
    height, width = frames.shape[1:3]
    if abs(width / height * size[1] / size[0] - 1) > _SAME_ASPECT:
        raise ValueError(f"{path} is {width}x{height}, which is not the shape of {size[0]}x{size[1]}")
    return np.stack([_resize(frame, size) for frame in frames])


def _resize(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if frame.shape[1::-1] == size:
        return frame
    larger = frame.shape[1] > size[0]
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA if larger else cv2.INTER_CUBIC), np.uint8)


def _cover(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The centre of a frame in the shape of `size`, resized to it."""
    height, width = frame.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    w, h = min(width, round(size[0] / scale)), min(height, round(size[1] / scale))
    x, y = (width - w) // 2, (height - h) // 2
    return _resize(np.ascontiguousarray(frame[y : y + h, x : x + w]), size)


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    return cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float64) / 255


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _plain(value: Any) -> Any:
    """JSON has no word for NaN and infinity: null."""
    if isinstance(value, Mapping):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
