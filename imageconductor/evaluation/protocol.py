"""An evaluation: missing videos are made, each video is scored, and the scores are summarised.

    OUTPUT/requests/SET/KEY.png         first frame; KEY.json has the trajectories, prompts.json the prompts
    OUTPUT/videos/METHOD/TASK/KEY.mp4   video of a model; KEY.json has its settings, made_with.json those of the method
    OUTPUT/scores/METHOD/TASK/KEY.json  metrics of one video; METHOD/NAME.json is a Fréchet distance
    OUTPUT/reference/                   statistics of the reference videos
    OUTPUT/results.json                 summary

Every file appears at once and complete, so a run that was killed continues where it stopped, and the processes of
`accelerate launch` share the work by the number of the request. All metrics are of the mp4 files, for models as for the
videos of other methods.
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

from imageconductor.checkpoints.model_folder import (
    check_adapters,
    check_shape,
    locate_model,
    read_sampling_defaults,
)
from imageconductor.conditioning import Trajectories
from imageconductor.data.trackers import CoTracker, LucasKanadeTracker, Tracker
from imageconductor.evaluation.appearance import ClipScorer, ssim
from imageconductor.evaluation.evaluate_config import EvaluateConfig, Method, RequestSet, Task
from imageconductor.evaluation.external_videos import FirstFrames, check_complete
from imageconductor.evaluation.generation_settings import collect_settings, list_attached_files, merge_with_record
from imageconductor.evaluation.reference_videos import list_reference_files
from imageconductor.evaluation.requests import Request, build_requests, write_requests
from imageconductor.evaluation.scores import measure, to_json_values
from imageconductor.evaluation.summary import summarise_evaluation
from imageconductor.evaluation.video_files import read_video, write_video
from imageconductor.files import check_writable, remove_partial, write_text
from imageconductor.sampling.branches import ADAPTERS, Control
from imageconductor.sampling.job import Inputs, SampleJob, load_pipeline, render
from imageconductor.sampling.video import upscale_for_viewing


class Evaluation:
    """One evaluation and its folder.

    Args:
        config: Settings.
        output: Folder to write, new or of the same evaluation.

    Raises:
        ValueError, FileNotFoundError: In one line, all that can be known to be wrong before the first video is made.
    """

    def __init__(self, config: EvaluateConfig, output: Path):
        self.config, self.output = config, output
        self.methods = config.all_methods
        self.state = _start_processes(config.device)
        if self.state.is_main_process:
            check_writable(output)
            if output.exists() and any(output.iterdir()) and not (output / "scores").is_dir():
                raise ValueError(f"{output} exists and holds something else; name another --output")
        self.size, self.num_frames = self._shape()
        kinds: set[RequestSet] = {task.requests for task in config.tasks.values()}
        self.requests = {kind: build_requests(config, kind, self.size, self.num_frames) for kind in sorted(kinds)}
        self.first_frames = {kind: FirstFrames(requests) for kind, requests in self.requests.items()}
        for name, method in self.methods.items():
            if method.videos is not None:
                check_complete(name, [path for task in config.tasks for path in self.video_paths(name, task)])
        self._check_appearance()
        self.device = config.device or str(self.state.device)
        self.clip = ClipScorer(config.clip, self.device) if config.clip is not None else None
        self.tracker: Tracker = LucasKanadeTracker()
        if config.tracker == "cotracker":
            self.tracker = CoTracker(config.cotracker, device=self.device)
        if self.state.is_main_process:
            (output / "scores").mkdir(parents=True, exist_ok=True)
            remove_partial(output)
            for kind, requests in self.requests.items():
                write_requests(output / "requests" / kind, requests)
        self.state.wait_for_everyone()

    def run(self) -> dict[str, Any] | None:
        """Makes and scores missing videos; returns the record for results.json, or None outside the main process."""
        for name, method in self.methods.items():
            if method.model is not None:
                self._record_settings(name, method)
                self._generate(name, method)
        self.state.wait_for_everyone()
        for name, method in self.methods.items():
            self._score(name, method)
        self.state.wait_for_everyone()
        self.state.destroy_process_group()  # The main process goes on alone, longer than a group would wait.
        return summarise_evaluation(self) if self.state.is_main_process else None

    def video_path(self, name: str, task: str, request: Request) -> Path:
        """File of a method's video."""
        videos = self.methods[name].videos
        root = Path(videos) if videos is not None else self.output / "videos" / name
        return root / task / f"{request.key}.mp4"

    def read_frames(self, path: Path) -> NDArray[np.uint8]:
        """Frames (T, H, W, 3) of a video file in the evaluation's size; see `read_video`."""
        return read_video(path, self.size, self.num_frames)

    def read_scores(self, name: str, task: str) -> list[dict[str, Any]]:
        """Metrics of each video that a method made for a task, in the order of the requests."""
        folder = self.output / "scores" / name / task
        return [
            {**json.loads((folder / f"{request.key}.json").read_text()), "source": request.source}
            for request in self._task_requests(task)
        ]

    def _task_requests(self, task: str) -> list[Request]:
        return self.requests[self.config.tasks[task].requests]

    def video_paths(self, name: str, task: str) -> list[Path]:
        """Files of all videos of a method for a task, in the order of the requests."""
        return [self.video_path(name, task, request) for request in self._task_requests(task)]

    # -- before anything is made

    def _shape(self) -> tuple[tuple[int, int], int]:
        """(W, H) and T of all videos, once it is sure that every model can make them as the tasks want."""
        folders = {name: locate_model(method.model) for name, method in self.methods.items() if method.model}
        shapes = {}
        for name, folder in folders.items():
            for task in self.config.tasks.values():
                if task.control != "none":
                    check_adapters(folder, ADAPTERS[Control(task.control)], f"control {task.control!r}")
            for file in list_attached_files(self.methods[name]):
                if not Path(file).is_file():
                    raise FileNotFoundError(f"method {name}: no file at {file}")
            defaults = read_sampling_defaults(folder)
            shapes[name] = ((defaults["width"], defaults["height"]), defaults["num_frames"])
        if len(set(shapes.values())) > 1 and None in (self.config.size, self.config.num_frames):
            raise ValueError(f"the models make videos of different shapes, {shapes}: set size and num_frames")
        size, num_frames = next(iter(shapes.values()), ((384, 256), 16))
        width, height = self.config.size or size
        num_frames = self.config.num_frames or num_frames
        for folder in folders.values():
            check_shape(folder, (width, height), num_frames)
        return (width, height), num_frames

    def _check_appearance(self) -> None:
        """Checks what metrics of appearance need: torchmetrics, the networks' files, the reference videos."""
        ssim(np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8))
        for name in self.config.frechet:
            weights = getattr(self.config, f"{name}_weights", None)
            if weights is not None and not Path(weights).is_file():
                raise FileNotFoundError(f"{name}_weights: no file at {weights}; docs/reproduce.md says where to get it")
        if self.config.frechet and self.config.reference is not None:
            list_reference_files(self.config)

    def _record_settings(self, name: str, method: Method) -> None:
        """Writes made_with.json, or refuses to go on with videos that were made with other settings."""
        record = self.output / "videos" / name / "made_with.json"
        settings = collect_settings(self.config, method, self.requests, self.size, self.num_frames)
        settings = merge_with_record(record, settings)
        self.state.wait_for_everyone()  # The others have read the record.
        if self.state.is_main_process:
            write_text(record, json.dumps(settings, indent=1))

    # -- videos

    def _generate(self, name: str, method: Method) -> None:
        batches = list(self._list_missing(name))
        if not batches:
            return
        pipe = load_pipeline(self._build_inputs(method, batches[0][1], batches[0][2][0]).job)
        pipe.set_progress_bar_config(disable=True)
        for task_name, task, batch in self._show_progress(batches, f"{name}: videos"):
            started = time.perf_counter()
            videos = render(pipe, [self._build_inputs(method, task, request) for request in batch])
            seconds = (time.perf_counter() - started) / len(batch)
            for request, (video,) in zip(batch, videos, strict=True):
                path = self.video_path(name, task_name, request)
                settings = {"prompt": request.prompt, "seed": request.seed, **asdict(task)}
                settings |= {"seconds": round(seconds, 3), "batch": len(batch)}
                write_text(path.with_suffix(".json"), json.dumps(settings, indent=1))
                write_video(path, upscale_for_viewing(video)[0])

    def _list_missing(self, name: str) -> Iterator[tuple[str, Task, list[Request]]]:
        """Batches of this process's requests for which there is no video yet."""
        for task_name, task in self.config.tasks.items():
            missing = iter([r for r in self._own_part(task) if not self.video_path(name, task_name, r).exists()])
            while batch := list(islice(missing, self.config.batch_size)):
                yield task_name, task, batch

    def _own_part(self, task: Task) -> list[Request]:
        """Every n-th request of a task, where n processes share the work."""
        return self.requests[task.requests][self.state.process_index :: self.state.num_processes]

    def _build_inputs(self, method: Method, task: Task, request: Request) -> Inputs:
        """The request as `sample.py` would be asked for it."""
        width, height = self.size
        job = SampleJob(
            model=str(locate_model(method.model or "")),
            base=method.base,
            lora=method.lora,
            motion_lora=method.motion_lora,
            prompt=request.prompt,
            control=None if task.control == "none" else task.control,
            camera_free_scale=task.camera_free_scale,
            guidance_scale=self.config.guidance_scale,
            trajectory_guidance_scale=self.config.trajectory_guidance_scale,
            steps=self.config.num_inference_steps,
            num_frames=self.num_frames,
            width=width,
            height=height,
            seed=[request.seed],
            device=self.device,
            dtype=self.config.dtype or ("float16" if self.device.startswith("cuda") else "float32"),
        )
        drawn = request.trajectories if task.control != "none" else Trajectories.empty(self.size, self.num_frames)
        return Inputs(job, Image.fromarray(request.image), drawn)

    # -- scores

    def _score(self, name: str, method: Method) -> None:
        jobs = []
        for task_name, task in self.config.tasks.items():
            for request in self._own_part(task):
                path = self.video_path(name, task_name, request)
                stat = path.stat()
                measured_with = {
                    "tracker": f"{self.tracker.name} {self.tracker.version}",
                    "clip": self.config.clip,
                    "video": [str(path.resolve()), stat.st_size, stat.st_mtime_ns],
                }
                target = self.output / "scores" / name / task_name / f"{request.key}.json"
                old = json.loads(target.read_text()) if target.exists() else {"failed": "not measured yet"}
                if "failed" in old or old.get("measured_with") != measured_with:
                    jobs.append((path, target, task.requests, request, measured_with))
        for path, target, kind, request, measured_with in self._show_progress(jobs, f"{name}: scores"):
            video = self.read_frames(path)
            if method.videos is not None:
                self.first_frames[kind].check(path, request, video[0])
            score = measure(request, video, self.tracker, self.clip)
            settings = path.with_suffix(".json")
            if method.model is not None and settings.exists():
                score["seconds"] = json.loads(settings.read_text())["seconds"]
            score = {"key": request.key, **to_json_values(score), "measured_with": measured_with}
            write_text(target, json.dumps(score))

    def _show_progress(self, jobs: list[Any], title: str) -> Any:
        return tqdm(jobs, desc=title, dynamic_ncols=True, disable=not jobs or not self.state.is_main_process)


def _start_processes(device: str | None) -> PartialState:
    """The processes that share the work; on CPUs, accelerate lets them know of each other only if `cpu` is set."""
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return PartialState(cpu=device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not has_gpu)
