"""An evaluation: videos are made where they are missing, each is scored, and the scores become figures.

    OUTPUT/requests/SET/KEY.png      first frame; KEY.json trajectories; prompts.json: for other methods
    OUTPUT/videos/ROW/ARM/KEY.mp4    what a model made, and KEY.json, how
    OUTPUT/scores/ROW/ARM/KEY.json   what was measured on one video
    OUTPUT/results.json              the figures

Every file appears whole, so a run that was killed goes on where it stopped, and the processes of `accelerate launch`
share the work by the number of the request. Figures come from the files alone, for our videos as for those of others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from imageconductor.checkpoints.personalise import personalise
from imageconductor.data.trackers import CoTracker, LucasKanadeTracker, Tracker
from imageconductor.evaluation import motion
from imageconductor.evaluation.appearance import ClipScorer, ssim
from imageconductor.evaluation.evaluate_config import Arm, EvaluateConfig, RequestSet, Row
from imageconductor.evaluation.frechet import frechet_distance
from imageconductor.evaluation.requests import Request, build_requests, reference_clips
from imageconductor.evaluation.scores import figures, measure, named_figures, plain, px_at_384x256
from imageconductor.evaluation.video_files import (
    read_reference,
    read_video,
    remove_partial,
    thumbnail,
    write_text,
    write_video,
)
from imageconductor.sampling.job import parse_lora
from imageconductor.sampling.pipeline import ImageConductorPipeline, model_folder
from imageconductor.sampling.video import to_uint8, upscale_for_viewing


class Evaluation:
    """One evaluation and its folder.

    Args:
        config: What is measured.
        output: Folder to write, new or of the same evaluation.

    Raises:
        ValueError, FileNotFoundError: In one line, whatever can be known to be wrong before the first video is made.
    """

    def __init__(self, config: EvaluateConfig, output: Path):
        self.config, self.output = config, output
        self.state = _processes(config.device)
        if output.exists() and any(output.iterdir()) and not (output / "scores").is_dir():
            raise ValueError(f"{output} exists and holds something else; name another --output")
        self.size, self.num_frames = self._shape()
        kinds: set[RequestSet] = {arm.requests for arm in config.arms.values()}
        self.requests = {kind: build_requests(config, kind, self.size, self.num_frames) for kind in sorted(kinds)}
        self.thumbnails = {
            kind: np.stack([thumbnail(request.image) for request in requests])
            for kind, requests in self.requests.items()
        }
        for name, row in config.table.items():
            if row.videos is not None:
                self._check_videos(name, row)
        self._check_comparison()
        self.device = config.device or str(self.state.device)
        self.clip = ClipScorer(config.clip, self.device) if config.clip is not None else None
        self.tracker: Tracker = LucasKanadeTracker()
        if config.tracker == "cotracker":
            self.tracker = CoTracker(config.cotracker, device=self.device)
        if self.state.is_main_process:
            (output / "scores").mkdir(parents=True, exist_ok=True)
            remove_partial(output)
            self._write_requests()
        self.state.wait_for_everyone()

    def run(self) -> dict[str, Any] | None:
        """Makes what is missing, scores it, and returns the record of results.json; None but in the first process."""
        for name, row in self.config.table.items():
            if row.model is not None:
                self._claim(name, row)
                self._generate(name, row)
        self.state.wait_for_everyone()
        for name, row in self.config.table.items():
            self._score(name, row)
        self.state.wait_for_everyone()
        self.state.destroy_process_group()  # The first process goes on alone, longer than a group would wait.
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
            for file in _files(row):
                if not Path(file).is_file():
                    raise FileNotFoundError(f"row {name}: no file at {file}")
            defaults = ImageConductorPipeline.read_sampling_defaults(folder)
            sizes[name] = ((defaults["width"], defaults["height"]), defaults["num_frames"])
        if len(set(sizes.values())) > 1 and None in (self.config.size, self.config.num_frames):
            raise ValueError(f"the models make videos of different shapes, {sizes}: set size and num_frames")
        size, num_frames = next(iter(sizes.values()), ((384, 256), 16))
        width, height = self.config.size or size
        num_frames = self.config.num_frames or num_frames
        for name in sizes:
            folder = model_folder(self.config.table[name].model or "")
            ImageConductorPipeline.check_shape(folder, (width, height), num_frames)
        return (width, height), num_frames

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

    def _check_first_frame(self, path: Path, kind: RequestSet, request: Request, frame: NDArray[np.uint8]) -> None:
        """Refuses a video that begins with another request's picture: the names are mixed up."""
        distances = np.abs(self.thumbnails[kind] - thumbnail(frame)).mean(axis=(1, 2, 3))
        nearest = int(distances.argmin())
        if 2 * distances[nearest] + 0.02 < np.abs(thumbnail(request.image) - thumbnail(frame)).mean():
            raise ValueError(
                f"{path} begins with the picture of {self.requests[kind][nearest].key}, not of {request.key}; "
                "are the names mixed up?"
            )

    def _write_requests(self) -> None:
        for kind, requests in self.requests.items():
            folder = self.output / "requests" / kind
            folder.mkdir(parents=True, exist_ok=True)
            for request in requests:
                if not (folder / f"{request.key}.json").exists():
                    Image.fromarray(request.image).save(folder / f"{request.key}.png")
                    request.trajectories.save(folder / f"{request.key}.json")
            write_text(folder / "prompts.json", json.dumps({r.key: r.prompt for r in requests}, indent=1))

    def _claim(self, name: str, row: Row) -> None:
        """Refuses to go on with videos that were made with other settings."""
        config = self.config
        weights = {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in _weights(row)}
        keys = (
            "images",
            "motions",
            "strength",
            "world_seed",
            "style",
            "num_points",
            "seed",
            "num_inference_steps",
            "dtype",
        )
        settings = {key: getattr(config, key) for key in (*keys, "guidance_scale", "trajectory_guidance_scale")}
        settings |= {"size": self.size, "num_frames": self.num_frames, "row": asdict(row), "weights": weights}
        settings |= {"sampling_defaults": ImageConductorPipeline.read_sampling_defaults(model_folder(row.model or ""))}
        if config.motions == "presets":  # Seeds count the requests.
            settings |= {"presets": [config.camera_presets, config.object_presets]}
            settings |= {"keys": [r.key for r in next(iter(self.requests.values()))] if config.images else None}
        settings |= {f"arm {arm}": asdict(asked) for arm, asked in config.arms.items()}
        new: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        record = self.output / "videos" / name / "made_with.json"
        old = json.loads(record.read_text()) if record.exists() else {}
        asked = {key for key in new if key in old or not key.startswith("arm ")}  # An arm may be added later.
        if old and (changed := sorted(key for key in asked if key not in old or old[key] != new[key])):
            raise ValueError(
                f"{record.parent} was made with other settings ({', '.join(changed)}); name another --output"
            )
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            write_text(record, json.dumps({**old, **new}, indent=1))

    # -- videos

    def _generate(self, name: str, row: Row) -> None:
        jobs = list(self._missing(name, row))
        if not jobs:
            return
        pipe = self._pipeline(row)
        for arm_name, arm, batch in self._progress(jobs, f"{name}: videos"):
            started = time.perf_counter()
            frames = self._sample(pipe, arm, batch)
            seconds = (time.perf_counter() - started) / len(batch)
            for request, video in zip(batch, frames, strict=True):
                path = self.video_path(name, row, arm_name, request)
                asked = {"prompt": request.prompt, "seed": request.seed, **asdict(arm), "seconds": round(seconds, 3)}
                asked["batch"] = len(batch)
                write_text(path.with_suffix(".json"), json.dumps(asked, indent=1))
                write_video(path, upscale_for_viewing(video)[0])

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
            trajectory_guidance_scale=self.config.trajectory_guidance_scale,
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
                    jobs.append((path, target, arm.requests, request, made))
        for path, target, kind, request, made in self._progress(jobs, f"{name}: scores"):
            video = self.read(path)
            if row.videos is not None:
                self._check_first_frame(path, kind, request, video[0])
            score = measure(request, video, self.tracker, self.clip)
            beside = path.with_suffix(".json")
            if row.model is not None and beside.exists():
                score["seconds"] = json.loads(beside.read_text())["seconds"]
            write_text(target, json.dumps({"key": request.key, **plain(score), "made_with": made}))

    # -- figures

    def _record(self) -> dict[str, Any]:
        scale = px_at_384x256(self.size)
        rows: dict[str, Any] = {}
        for name, row in self.config.table.items():
            arms = {arm: figures(self.clip_scores(name, arm), scale) for arm in self.config.arms}
            rows[name] = {**asdict(row), "arms": arms, "frechet": self._frechet(name, row)}
        first = next(iter(rows))
        named = named_figures(rows[first]["arms"], {arm: self.clip_scores(first, arm) for arm in self.config.arms})
        return plain(
            {
                **{key: figure["mean"] for key, figure in named.items()},
                "intervals": named,
                "rows": rows,
                "tracker_on_the_true_clips": self._own_scores(),
                "settings": {
                    **asdict(self.config),
                    "size": self.size,
                    "num_frames": self.num_frames,
                    "tracker": f"{self.tracker.name} {self.tracker.version}",
                    "px_at_384x256_per_px": scale,
                    "num_processes": self.state.num_processes,
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
        stride = self.config.reference_stride
        if self.config.reference is None:
            yield from reference_clips(self.config, self.size, self.num_frames)
            return
        for path in self._reference_paths():
            yield read_reference(path, self.size, self.num_frames, stride)

    def _reference_paths(self) -> list[Path]:
        return sorted(Path(self.config.reference or "").rglob("*.mp4"))[: self.config.num_reference]

    def _progress(self, jobs: list[Any], title: str) -> Any:
        return tqdm(jobs, desc=title, dynamic_ncols=True, disable=not jobs or not self.state.is_main_process)


def _weights(row: Row) -> list[Path]:
    """Files that a row's videos depend on; a style LoRA beside the model only if the row asks for it."""
    folder = model_folder(row.model or "")
    parts = [path for path in folder.rglob("*.safetensors") if path.relative_to(folder).parts[0] != "style_lora"]
    return sorted([*parts, *map(Path, _files(row))])


def _files(row: Row) -> list[str]:
    """Files that a row puts on its model."""
    return [*([row.base] if row.base else []), *(parse_lora(text)[0] for text in (*row.lora, *row.motion_lora))]


def _processes(device: str | None) -> PartialState:
    """The processes that share the work; accelerate takes several on a CPU for one each unless it is told."""
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return PartialState(cpu=device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not has_gpu)
