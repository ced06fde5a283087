"""An evaluation: missing videos are made, each video is scored, and the scores are summarised.

    OUTPUT/requests/METHOD/SET/         requests in the method's format (`request_files`)
    OUTPUT/videos/METHOD/TASK/KEY.mp4   video of a model; KEY.json has its settings, made_with.json those of the method
    OUTPUT/scores/METHOD/TASK/KEY.json  metrics of one video; METHOD/NAME.json is a Fréchet distance
    OUTPUT/true_clips/SET/KEY.json      metrics of the clip that truly begins as a request does: the tracker's error
    OUTPUT/reference/                   statistics of the reference videos
    OUTPUT/results.json                 summary

Every file appears at once and complete, so a run that was killed continues where it stopped, and the processes of
`accelerate launch` share the work by the number of the request. All metrics are of the mp4 files, for models as for the
videos of other methods.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imageconductor.checkpoints.few_step import few_step_defaults
from imageconductor.checkpoints.model_folder import locate_model, read_sampling_defaults
from imageconductor.conditioning import Trajectories
from imageconductor.devices import choose_device
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig, Method, RequestSet, Task
from imageconductor.evaluation.drawn_motion.distances import list_missing_references
from imageconductor.evaluation.drawn_motion.external_videos import FirstFrames, check_complete
from imageconductor.evaluation.drawn_motion.generation_settings import collect_settings
from imageconductor.evaluation.drawn_motion.input_checks import check_instruments, check_models, check_references
from imageconductor.evaluation.drawn_motion.reference_statistics import collect_own_part, locate_statistics
from imageconductor.evaluation.drawn_motion.reference_videos import forget_reference_files
from imageconductor.evaluation.drawn_motion.request_files import write_requests
from imageconductor.evaluation.drawn_motion.requests import Request, build_sets
from imageconductor.evaluation.drawn_motion.scores import measure
from imageconductor.evaluation.drawn_motion.summary import summarise_evaluation, summarise_true_clips
from imageconductor.evaluation.drawn_motion.video_format import fit_requests, resolve_formats
from imageconductor.evaluation.generation_settings import locate_record, merge_with_record
from imageconductor.evaluation.input_checks import build_tracker, check_output
from imageconductor.evaluation.metrics.appearance import ClipScorer
from imageconductor.evaluation.metrics.frechet_names import check_fvd_frames
from imageconductor.evaluation.metrics.motion import psnr
from imageconductor.evaluation.score_files import identify_file, is_scored, write_score
from imageconductor.evaluation.video_files import is_made, keep_video, read_video
from imageconductor.files import remove_partial, write_record
from imageconductor.processes import own_part, show_progress, start_processes
from imageconductor.sampling.job import Inputs, SampleJob, load_pipeline, render
from imageconductor.sampling.video import upscale_for_viewing

logger = logging.getLogger(__name__)

_EQUAL_DB = 100.0  # the PSNR of a video to itself, instead of infinity
_LOW_FRACTION = 0.9  # of the points of true clips; Lucas-Kanade follows 0.98 of those of the tables in docs/results.md


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
        self.state = start_processes(config.device)
        self.device = config.device or str(self.state.device)
        self.dtype: Literal["float32", "float16", "bfloat16"] = config.dtype or (
            "float16" if self.device.startswith("cuda") else "float32"
        )
        if self.state.is_main_process:
            check_output(output)
        self.drawn, self.formats = resolve_formats(config)
        check_models(config, {name: wanted.size for name, wanted in self.formats.items()})
        self._check_originals()
        for wanted in self.formats.values():
            check_fvd_frames(config.frechet, wanted.num_judged)
        self.requests = build_sets(config, self.drawn.size, self.drawn.num_frames)
        self._fitted: dict[Any, list[Request]] = {}
        self._settings = {name: self._settle(name, method) for name, method in self.methods.items() if method.model}
        choose_device(self.device)
        forget_reference_files()
        self._check_external_videos()
        check_instruments(config)
        self._check_references()
        self.clip = ClipScorer(config.clip, self.device) if config.clip is not None else None
        self.tracker = build_tracker(config, self.device)
        if self.state.is_main_process:
            (output / "scores").mkdir(parents=True, exist_ok=True)
            remove_partial(output)
            write_requests(output / "requests", self.requests, self.drawn, self.formats)
        self.state.wait_for_everyone()

    def run(self) -> dict[str, Any] | None:
        """Makes and scores missing videos; returns the record for results.json, or None outside the main process."""
        self._score_true_clips()
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self._warn_of_lost_true_clips()
        for name, method in self.methods.items():
            if method.model is not None:
                if self.state.is_main_process:
                    write_record(locate_record(self.output, name), self._settings[name])
                self._generate(name)
        self.state.wait_for_everyone()
        for name in self.methods:
            self._score(name)
        for distance, wanted in list_missing_references(self):
            collect_own_part(self, distance, wanted)
        self.state.wait_for_everyone()
        self.state.destroy_process_group()  # The main process goes on alone, longer than a group would wait.
        return summarise_evaluation(self) if self.state.is_main_process else None

    def requests_for(self, name: str, task: str, judged: bool = True) -> list[Request]:
        """The requests of a task in the format of a method; see `fit_requests`."""
        kind, wanted = self.config.tasks[task].requests, self.formats[name]
        key = (kind, wanted, judged or wanted.frames is None)
        if key not in self._fitted:
            self._fitted[key] = fit_requests(self.requests[kind], self.drawn, wanted, judged=judged)
        return self._fitted[key]

    def video_path(self, name: str, task: str, request: Request) -> Path:
        """File of a method's video."""
        videos = self.methods[name].videos
        root = Path(videos) if videos is not None else self.output / "videos" / name
        return root / task / f"{request.key}.mp4"

    def video_paths(self, name: str, task: str) -> list[Path]:
        """Files of all videos of a method for a task, in the order of the requests."""
        return [self.video_path(name, task, request) for request in self.requests_for(name, task)]

    def read_frames(self, name: str, path: Path) -> NDArray[np.uint8]:
        """The judged frames (T, H, W, 3) of a method's video; see `read_video`."""
        wanted = self.formats[name]
        return wanted.select_judged(read_video(path, wanted.size, wanted.num_frames))

    def read_scores(self, name: str, task: str) -> list[dict[str, Any]]:
        """Metrics of each video that a method made for a task, in the order of the requests."""
        folder = self.output / "scores" / name / task
        return _read_scores(folder, self.requests_for(name, task))

    def read_true_scores(self, kind: RequestSet) -> list[dict[str, Any]]:
        """Metrics of the true clips of a set's requests, where these are known."""
        known = [request for request in self.requests[kind] if request.truth is not None]
        return _read_scores(self.output / "true_clips" / kind, known)

    # -- before anything is made

    def _settle(self, name: str, method: Method) -> dict[str, Any]:
        """What a method's videos are made with; refuses to go on with videos that were made with other settings."""
        settings = collect_settings(self.config, method, self.requests, self.drawn, self.formats[name], self.dtype)
        unknown = {"dtype"} if self.config.dtype is None else set()  # Earlier versions recorded what was asked for.
        return merge_with_record(locate_record(self.output, name), settings, unknown, self.config.idle)

    def _check_originals(self) -> None:
        """Refuses to compare videos frame by frame that have different frames."""
        for name, method in self.methods.items():
            if method.original is not None and self.formats[name] != self.formats[method.original]:
                formats = f"{self.formats[name]} and {self.formats[method.original]}"
                raise ValueError(
                    f"method {name}: its original {method.original} has videos of another format: {formats}"
                )

    def _check_references(self) -> None:
        """Looks at the reference videos, unless their statistics are there."""
        new = {
            wanted
            for wanted in self.formats.values()
            if any(not locate_statistics(self, distance, wanted).exists() for distance in self.config.frechet)
        }
        if self.config.reference is not None and new:
            check_references(self.config, max(wanted.num_judged for wanted in new), self.state)

    def _check_external_videos(self) -> None:
        """Looks at this process's part of the videos that are made elsewhere and have no score yet."""
        external = [name for name, method in self.methods.items() if method.videos is not None]
        for name in external:
            check_complete(name, [path for task in self.config.tasks for path in self.video_paths(name, task)])
        for name in external:
            for task in self.config.tasks:
                first_frames = FirstFrames(self.requests_for(name, task))
                jobs = [
                    (path, request)
                    for path, target, request in self._list_videos(name, task)
                    if not self._is_scored(target, path, request)
                ]
                for path, request in show_progress(self.state, jobs, f"{name}: checks of {task}"):
                    if self.config.tasks[task].image:
                        first_frames.check(path, request, self.formats[name])
                    else:
                        self.read_frames(name, path)

    # -- videos

    def _generate(self, name: str) -> None:
        batches = list(self._list_missing(name))
        if not batches:
            return
        pipe = load_pipeline(self._build_inputs(name, batches[0][1], batches[0][2][0]).job)
        pipe.set_progress_bar_config(disable=True)
        for task_name, task, batch in show_progress(self.state, batches, f"{name}: videos"):
            started = time.perf_counter()
            videos = render(pipe, [self._build_inputs(name, task, request) for request in batch])
            seconds = (time.perf_counter() - started) / len(batch)
            for request, (video,) in zip(batch, videos, strict=True):
                path = self.video_path(name, task_name, request)
                settings = {"prompt": request.prompt, "seed": request.seed, **task.settings}
                settings |= {"seconds": round(seconds, 3), "batch": len(batch), "request": request.sha256}
                keep_video(path, upscale_for_viewing(video)[0], settings)

    def _list_missing(self, name: str) -> Iterator[tuple[str, Task, list[Request]]]:
        """Batches of this process's requests for which there is no video yet."""
        for task_name, task in self.config.tasks.items():
            requests = own_part(self.state, self.requests_for(name, task_name, judged=False))
            missing = iter([r for r in requests if not is_made(self.video_path(name, task_name, r), r.sha256)])
            while batch := list(islice(missing, self.config.batch_size)):
                yield task_name, task, batch

    def _build_inputs(self, name: str, task: Task, request: Request) -> Inputs:
        """The request as `sample.py` would be asked for it."""
        method, wanted, config = self.methods[name], self.formats[name], self.config
        model = locate_model(method.model or "")
        asked = {
            "steps": config.num_inference_steps,
            "guidance_scale": config.guidance_scale,
            "trajectory_guidance_scale": config.trajectory_guidance_scale,
        }
        if method.few_step:  # The evaluation's are the teacher's, which the LoRA holds.
            asked = few_step_defaults(read_sampling_defaults(model)["num_inference_steps"])
        own = {"steps": method.num_inference_steps, "guidance_scale": method.guidance_scale}
        asked |= {key: value for key, value in own.items() if value is not None}
        job = SampleJob(
            model=str(model),
            base=method.base,
            lora=method.lora,
            motion_lora=method.motion_lora,
            prompt=request.prompt,
            control=None if task.control == "none" else task.control,
            camera_free_scale=task.camera_free_scale,
            few_step=method.few_step,
            guidance_interval=method.guidance_interval,
            controlnet_interval=method.controlnet_interval,
            num_frames=wanted.num_frames,
            width=wanted.size[0],
            height=wanted.size[1],
            seed=[request.seed],
            device=self.device,
            dtype=self.dtype,
            **asked,
        )
        drawn = request.trajectories if task.control != "none" else Trajectories.empty(wanted.size, wanted.num_frames)
        return Inputs(job, Image.fromarray(request.image) if task.image else None, drawn)

    # -- scores

    def _score(self, name: str) -> None:
        method = self.methods[name]
        jobs = [
            (task_name, path, target, request)
            for task_name in self.config.tasks
            for path, target, request in self._list_videos(name, task_name)
            if not self._is_scored(target, path, request, self._instruments_for(method, task_name, request))
        ]
        for task_name, path, target, request in show_progress(self.state, jobs, f"{name}: scores"):
            frames = self.read_frames(name, path)
            score = measure(request, frames, self.tracker, self.clip)
            if not self.config.tasks[task_name].image:
                score = {metric: value for metric, value in score.items() if not metric.startswith("first_frame")}
            if method.original is not None:
                original = self.read_frames(method.original, self.video_path(method.original, task_name, request))
                score["original_psnr"] = min(psnr(frames / 255, original / 255), _EQUAL_DB)
            settings = path.with_suffix(".json")
            if method.model is not None and settings.exists():
                score["seconds"] = json.loads(settings.read_text())["seconds"]
            self._write_score(target, score, path, request, self._instruments_for(method, task_name, request))

    def _score_true_clips(self) -> None:
        """The tracker's own error, from the requests whose true clip is known."""
        jobs = []
        for kind, requests in self.requests.items():
            for request in own_part(self.state, [request for request in requests if request.truth is not None]):
                target = self.output / "true_clips" / kind / f"{request.key}.json"
                if not self._is_scored(target, None, request, self._tracker_version):
                    jobs.append((target, request))
        for target, request in show_progress(self.state, jobs, "true clips: scores"):
            score = measure(request, request.truth, self.tracker)
            self._write_score(target, score, None, request, self._tracker_version)

    def _warn_of_lost_true_clips(self) -> None:
        """Says before videos are made that their errors will tell little, where even true clips cannot be followed."""
        found = summarise_true_clips(self)
        for kind in self.requests:
            fraction = found.get(f"{kind}_tracked_fraction", {"mean": 1.0})["mean"]
            if fraction < _LOW_FRACTION:
                logger.warning(
                    "the tracker follows only %.2f of the %s points on the true clips, so errors of videos will tell "
                    "little: choose larger or slower sprites with patterns, or another tracker",
                    fraction,
                    kind,
                )

    def _list_videos(self, name: str, task: str) -> list[tuple[Path, Path, Request]]:
        """This process's part of a method's videos for a task: video, score, request."""
        folder = self.output / "scores" / name / task
        return [
            (self.video_path(name, task, request), folder / f"{request.key}.json", request)
            for request in own_part(self.state, self.requests_for(name, task))
        ]

    @property
    def _tracker_version(self) -> dict[str, Any]:
        return {"tracker": f"{self.tracker.name} {self.tracker.version}"}

    def _instruments_for(self, method: Method, task: str, request: Request) -> dict[str, Any]:
        """What a method's video is measured with: tracker, CLIP model, and the video that it is to equal."""
        instruments = {**self._tracker_version, "clip": self.config.clip}
        if method.original is not None:
            instruments["original"] = identify_file(self.video_path(method.original, task, request))
        return instruments

    def _is_scored(
        self, target: Path, path: Path | None, request: Request, instruments: dict[str, Any] | None = None
    ) -> bool:
        """Whether a video (None = the true clip) has a score, complete and by these instruments if any are given."""
        expected = {**_identify(path, request), **(instruments or {})}
        return is_scored(target, expected, is_complete=instruments is not None)

    def _write_score(
        self, target: Path, score: dict[str, Any], path: Path | None, request: Request, instruments: dict[str, Any]
    ) -> None:
        write_score(target, request.key, score, {**_identify(path, request), **instruments})


def _read_scores(folder: Path, requests: list[Request]) -> list[dict[str, Any]]:
    return [
        {**json.loads((folder / f"{request.key}.json").read_text()), "source": request.source} for request in requests
    ]


def _identify(path: Path | None, request: Request) -> dict[str, Any]:
    """The video and the request that a score is of."""
    return {"video": None if path is None else identify_file(path), "request": request.sha256}
