"""An evaluation of boxes: a video of each clip's first frame, caption and boxes by every method, scores, the summary.

    OUTPUT/videos/METHOD/KEY.mp4   KEY.json has prompt and seed, made_with.json the method's settings
    OUTPUT/scores/METHOD/KEY.json  metrics of one video; of "true clips", those of the clip itself
    OUTPUT/results.json            summary

Every file appears at once and complete, so a run that was killed continues where it stopped, and the processes of
`accelerate launch` share the work. All metrics are of the mp4 files.

Source: SMCD (arXiv 2403.10179), whose metrics are AO, SR50 and SR75 of a tracker that starts on the box of frame 0,
fidelity to the first frame by CLIP and DINO, CLIP similarity and FVD. Its tracker is not known, nor which frames of a
clip are taken: here the first ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imageconductor.checkpoints.model_folder import check_adapters, check_controlnets, check_shape, read_gate_config
from imageconductor.conditioning import Trajectories
from imageconductor.evaluation.boxes.clips import BoxRequest, list_requests
from imageconductor.evaluation.boxes.config import BoxEvaluateConfig, BoxMethod
from imageconductor.evaluation.boxes.summary import summarise_boxes
from imageconductor.evaluation.generation_settings import (
    describe_few_steps,
    describe_files,
    list_weights,
    locate_record,
    merge_with_record,
)
from imageconductor.evaluation.input_checks import agree_on_shape, check_clip, check_output, network_file
from imageconductor.evaluation.metrics.appearance import ClipScorer, DinoEncoder, first_frame_fidelity
from imageconductor.evaluation.metrics.boxes import build_box_tracker, overlaps
from imageconductor.evaluation.metrics.frechet import load_network
from imageconductor.evaluation.metrics.frechet_names import check_fvd_frames
from imageconductor.evaluation.metrics.motion import psnr
from imageconductor.evaluation.score_files import identify_file, is_scored, write_score
from imageconductor.evaluation.scores import run_instruments
from imageconductor.evaluation.video_files import is_made, keep_video, read_video
from imageconductor.files import remove_partial, write_record
from imageconductor.processes import own_part, show_progress, start_processes
from imageconductor.sampling.branches import ADAPTERS, Control
from imageconductor.sampling.gate_inputs import check_boxes, check_gate_scales, choose_first_frame
from imageconductor.sampling.job import Inputs, SampleJob, load_pipeline, prepare, render
from imageconductor.sampling.loras import find_job_loras
from imageconductor.sampling.video import upscale_for_viewing

TRUE_CLIPS = "true clips"
"""Line of the table whose videos are the clips themselves: what the tracker and the autoencoders can see at best."""


class BoxEvaluation:
    """One evaluation of boxes and its folder.

    Args:
        config: Settings.
        output: Folder to write, new or of the same evaluation.

    Raises:
        ValueError, FileNotFoundError: In one line, all that can be known to be wrong before the first video is made.
    """

    def __init__(self, config: BoxEvaluateConfig, output: Path):
        self.config, self.output = config, output
        self.state = start_processes(config.device)
        if self.state.is_main_process:
            check_output(output)
        self.device = config.device or str(self.state.device)
        self.jobs = {name: self._prepare(name) for name in config.methods}
        self.size, self.num_frames = agree_on_shape(self.jobs)
        check_fvd_frames(config.frechet, self.num_frames)
        takers = [self._read_max_objects(name) for name, method in config.methods.items() if method.boxes]
        most = min((count for count in takers if count is not None), default=None)
        self.requests = list_requests(config, self.size, self.num_frames, most)
        for name in config.methods:
            self.jobs[name] = self._complete(name)
        self._settings = {name: self._settle(name) for name in config.methods}
        self.tracker = build_box_tracker(config.box_tracker)
        for distance in config.frechet:
            load_network(distance, network_file(config, distance))
        check_clip("clip", config.clip)
        check_clip("dino", config.dino, "model")
        self.clip = None if config.clip is None else ClipScorer(config.clip, self.device)
        self.dino = None if config.dino is None else DinoEncoder(config.dino, self.device)
        if self.state.is_main_process:
            (output / "scores").mkdir(parents=True, exist_ok=True)
            remove_partial(output)
        self.state.wait_for_everyone()

    def run(self) -> dict[str, Any] | None:
        """Makes and scores missing videos; returns the record for results.json, or None outside the main process."""
        for name in self.config.methods:
            if self.state.is_main_process:
                write_record(locate_record(self.output, name), self._settings[name])
            self._generate(name)
        self.state.wait_for_everyone()
        for name in (TRUE_CLIPS, *self.config.methods):
            self._score(name)
        self.state.wait_for_everyone()
        self.state.destroy_process_group()
        return summarise_boxes(self) if self.state.is_main_process else None

    def video_path(self, name: str, request: BoxRequest) -> Path:
        """File of a method's video."""
        return self.output / "videos" / name / f"{request.key}.mp4"

    def read_frames(self, name: str, request: BoxRequest) -> NDArray[np.uint8]:
        """(T, H, W, 3) of a method's video, or of the clip itself."""
        if name == TRUE_CLIPS:
            return request.read_frames()
        return read_video(self.video_path(name, request), self.size, self.num_frames)

    def read_scores(self, name: str) -> list[dict[str, Any]]:
        """Metrics of each video of a method, in the order of the requests."""
        return [
            {**json.loads(self._score_path(name, request).read_text()), "source": request.key}
            for request in self.requests
        ]

    # -- before anything is made

    def _prepare(self, name: str) -> SampleJob:
        """The settings of a method's videos, with its model's defaults."""
        config = self.config
        try:
            job = SampleJob(
                model=config.methods[name].model or config.model or "",
                motion_lora=config.methods[name].motion_lora,
                prompt="a clip's caption",
                negative_prompt=config.negative_prompt,
                guidance_scale=config.guidance_scale,
                steps=config.num_inference_steps,
                few_step=False,
                num_frames=config.num_frames,
                width=config.size and config.size[0],
                height=config.size and config.size[1],
                device=self.device,
                dtype=config.dtype,
            )
            return prepare(job).job
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"method {name}: {error}") from None

    def _complete(self, name: str) -> SampleJob:
        """A method's settings once it is sure that its model takes what it is given of every clip."""
        method, job = self.config.methods[name], self.jobs[name]
        try:
            check_shape(job.model, self.size)
            if method.image or method.centres:
                check_controlnets(job.model, "a video of an image or trajectories")
            if method.centres:
                check_adapters(job.model, ADAPTERS[Control(method.control)], f"control {method.control!r}")
            max_objects = self._read_max_objects(name)
            for request in self.requests if method.boxes else ():
                check_boxes(request.boxes, self.num_frames, max_objects)
            has_scene = read_gate_config(job.model, "scene_gates") is not None
            pictured = [(0,)] if method.image else []
            carrier = choose_first_frame(method.first_frame_by, pictured, method.boxes, has_scene)
            do_act = method.boxes or carrier != "controlnet"
            check_gate_scales(method.scene_guidance_scale, method.gated_fraction, do_act)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"method {name}: {error}") from None
        scales = {"scene_guidance_scale": method.scene_guidance_scale, "gated_fraction": method.gated_fraction}
        return replace(job, control=method.control, first_frame_by=carrier, **scales)

    def _read_max_objects(self, name: str) -> int | None:
        """Boxes that a method's model takes in a frame; None = it has no object gates."""
        config = read_gate_config(self.jobs[name].model, "object_gates")
        return None if config is None else config["max_objects"]

    def _settle(self, name: str) -> dict[str, Any]:
        """What a method's videos are made with; refuses to go on with videos that were made with other settings."""
        settings = _collect_settings(self.config, self.config.methods[name], self.jobs[name])
        return merge_with_record(locate_record(self.output, name), settings)

    # -- videos

    def _generate(self, name: str) -> None:
        batches = list(self._list_missing(name))
        if not batches:
            return
        pipe = load_pipeline(self.jobs[name])
        pipe.set_progress_bar_config(disable=True)
        for batch in show_progress(self.state, batches, f"{name}: videos"):
            started = time.perf_counter()
            videos = render(pipe, [self._build_inputs(name, request) for request in batch])
            seconds = (time.perf_counter() - started) / len(batch)
            for request, (video,) in zip(batch, videos, strict=True):
                path = self.video_path(name, request)
                facts = {"prompt": request.prompt, "seed": request.seed, "seconds": round(seconds, 3)}
                keep_video(path, upscale_for_viewing(video)[0], facts | {"request": request.sha256})

    def _list_missing(self, name: str) -> Iterator[list[BoxRequest]]:
        """Batches of this process's requests for which there is no video yet."""
        own = own_part(self.state, self.requests)
        missing = iter([request for request in own if not is_made(self.video_path(name, request), request.sha256)])
        while batch := list(islice(missing, self.config.batch_size)):
            yield batch

    def _build_inputs(self, name: str, request: BoxRequest) -> Inputs:
        method = self.config.methods[name]
        job = replace(self.jobs[name], prompt=request.prompt, seed=[request.seed])
        image = Image.fromarray(request.read_frames(1)[0]) if method.image else None
        drawn = Trajectories.empty(self.size, self.num_frames)
        if method.centres:
            drawn = request.boxes.centres()
        return Inputs(job, image, drawn, request.boxes if method.boxes else None)

    # -- scores

    def _score(self, name: str) -> None:
        jobs = [request for request in own_part(self.state, self.requests) if not self._is_scored(name, request)]
        for request in show_progress(self.state, jobs, f"{name}: scores"):
            score = self._measure(self.read_frames(name, request), request)
            if name != TRUE_CLIPS:
                facts = json.loads(self.video_path(name, request).with_suffix(".json").read_text())
                score["seconds"] = facts["seconds"]
            write_score(self._score_path(name, request), request.key, score, self._identify(name, request))

    def _measure(self, frames: NDArray[np.uint8], request: BoxRequest) -> dict[str, Any]:
        """Metrics of one video (T, H, W, 3); those of an instrument that fails are absent, and `failed` has the reason.

        overlaps: of each object, one in each frame that counts.  kept_overlaps: the same for the box of frame 0.
        first_frame_psnr: dB.  clip_text, first_frame_clip, first_frame_dino: cosines in [-1, 1].
        """
        first, boxes = request.read_frames(1), request.boxes
        score: dict[str, Any] = {"first_frame_psnr": psnr(frames[0] / 255, first[0] / 255)}

        def measure_overlaps() -> None:
            tracked, kept = [], []
            for n in range(boxes.num_objects):
                wanted, present = boxes.xyxy[n].numpy(), boxes.present[n].numpy()
                found = self.tracker.track(frames, wanted[0])
                tracked.append(overlaps(wanted, found, present, self.size).tolist())
                still = np.repeat(wanted[:1], len(wanted), axis=0)
                kept.append(overlaps(wanted, still, present, self.size).tolist())
            score["overlaps"], score["kept_overlaps"] = tracked, kept

        def measure_clip() -> None:
            if self.clip is not None:
                score["clip_text"], _ = self.clip(frames, request.prompt)
                score["first_frame_clip"] = first_frame_fidelity(self.clip, frames, first)

        def measure_dino() -> None:
            if self.dino is not None:
                score["first_frame_dino"] = first_frame_fidelity(self.dino, frames, first)

        return score | run_instruments({"tracker": measure_overlaps, "clip": measure_clip, "dino": measure_dino})

    def _score_path(self, name: str, request: BoxRequest) -> Path:
        return self.output / "scores" / name / f"{request.key}.json"

    def _is_scored(self, name: str, request: BoxRequest) -> bool:
        return is_scored(self._score_path(name, request), self._identify(name, request))

    def _identify(self, name: str, request: BoxRequest) -> dict[str, Any]:
        """The video, and all that its score depends on."""
        return {
            "video": None if name == TRUE_CLIPS else identify_file(self.video_path(name, request)),
            "request": request.sha256,
            "tracker": f"{self.tracker.name} {self.tracker.version}",
            **{setting: getattr(self.config, setting) for setting in ("clip", "dino")},
        }


def _collect_settings(config: BoxEvaluateConfig, method: BoxMethod, job: SampleJob) -> dict[str, Any]:
    """All that a method's videos depend on, beside the clips; weights by size and date.

    Args:
        config: Settings of the evaluation.
        method: The method.
        job: Its settings, with its model's defaults.
    """
    loras = [path for path, _ in find_job_loras(job)[1]]
    of_clips = ("dataset", "data", "split", "captions", "world", "frame_step", "seed")
    kept = ("negative_prompt", "guidance_scale", "trajectory_guidance_scale", "steps", "width", "height", "num_frames")
    settings: dict[str, Any] = {
        "protocol": "boxes",
        **{key: getattr(config, key) for key in of_clips},
        **{key: getattr(job, key) for key in (*kept, "dtype", "first_frame_by")},
        "method": asdict(method) | {"model": job.model},
        "weights": describe_files([*list_weights(Path(job.model)), *map(Path, loras)]),
        "gates": read_gate_config(str(job.model), "object_gates"),
        **describe_few_steps(job),
    }
    return json.loads(json.dumps(settings, default=str))
