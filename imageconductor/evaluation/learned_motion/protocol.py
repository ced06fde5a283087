"""An evaluation of learned motions: videos of prompts x motions by every method, their scores, and the summary.

    OUTPUT/videos/METHOD/MOTION/KEY.mp4   KEY.json has prompt and seed, METHOD/made_with.json the method's settings
    OUTPUT/scores/METHOD/MOTION/KEY.json  metrics of one video
    OUTPUT/results.json                   summary

Every file appears at once and complete, so a run that was killed continues where it stopped, and the processes of
`accelerate launch` share the work. All metrics are of the mp4 files.

Source: MotionDirector (arXiv 2310.08465). Its protocol is known at second hand (docs/reproduce.md); motion fidelity
takes the place of its study with people.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from imageconductor.checkpoints.model_folder import read_max_frames
from imageconductor.checkpoints.reference_run import NOISE_PRIOR_NAME
from imageconductor.conditioning import cover_crop, load_image
from imageconductor.data.reference_clips import read_frames
from imageconductor.data.reference_files import ReferenceClip, find_reference_clips
from imageconductor.evaluation.generation_settings import (
    MOTION,
    describe_few_steps,
    describe_files,
    list_weights,
    locate_record,
    merge_with_record,
)
from imageconductor.evaluation.input_checks import (
    agree_on_shape,
    build_tracker,
    check_clip,
    check_output,
    check_tracker,
)
from imageconductor.evaluation.learned_motion.config import LearnedMethod, LearnedMotionConfig, VideoRequest
from imageconductor.evaluation.learned_motion.summary import summarise_learned_motion
from imageconductor.evaluation.metrics.appearance import ClipScorer, PickScorer
from imageconductor.evaluation.metrics.motion_fidelity import TrackSet, fidelity_to_references, track_grid
from imageconductor.evaluation.score_files import identify_file, is_scored, write_score
from imageconductor.evaluation.scores import run_instruments
from imageconductor.evaluation.video_files import keep_video, read_video
from imageconductor.files import remove_partial, write_record
from imageconductor.processes import own_part, show_progress, start_processes
from imageconductor.sampling.job import Inputs, SampleJob, load_pipeline, prepare, render
from imageconductor.sampling.loras import find_lora, parse_noise_prior
from imageconductor.sampling.video import upscale_for_viewing


class LearnedMotionEvaluation:
    """One evaluation of learned motions and its folder.

    Args:
        config: Settings.
        output: Folder to write, new or of the same evaluation.

    Raises:
        ValueError, FileNotFoundError: In one line, all that can be known to be wrong before the first video is made.
    """

    def __init__(self, config: LearnedMotionConfig, output: Path):
        self.config, self.output = config, output
        self.state = start_processes(config.device)
        if self.state.is_main_process:
            check_output(output)
        self.device = config.device or str(self.state.device)
        self.requests = {name: motion.list_requests(name, config.seeds) for name, motion in config.motions.items()}
        self._inputs = {
            (name, motion): self._prepare(name, motion) for name in config.methods for motion in self.requests
        }
        self.size, self.num_frames = agree_on_shape({name: inputs.job for (name, _), inputs in self._inputs.items()})
        self._images = {
            path: cover_crop(load_image(path), self.size)
            for requests in self.requests.values()
            for path in dict.fromkeys(request.image for request in requests if request.image is not None)
        }
        self.references = {name: self._find_references(name) for name in config.motions}
        self._windows = {
            name: [[*identify_file(clip.path), clip.frames.start, clip.frames.step] for clip in windows]
            for name, windows in self.references.items()
        }
        self._settings = {name: self._settle(name) for name in config.methods}
        check_tracker(config)
        for setting in ("clip", "pick_score"):
            check_clip(setting, getattr(config, setting))
        self.clip = ClipScorer(config.clip, self.device, config.frame_pairs) if config.clip is not None else None
        self.pick = PickScorer(config.pick_score, self.device) if config.pick_score is not None else None
        self.tracker = build_tracker(config, self.device)
        self._tracks: dict[str, list[TrackSet]] = {}
        if self.state.is_main_process:
            (output / "scores").mkdir(parents=True, exist_ok=True)
            remove_partial(output)
        self.state.wait_for_everyone()

    def run(self) -> dict[str, Any] | None:
        """Makes and scores missing videos; returns the record for results.json, or None outside the main process.

        Raises:
            ValueError: Nothing moves in the reference clips of a motion.
        """
        self._track_references()
        for name in self.config.methods:
            if self.state.is_main_process:
                write_record(locate_record(self.output, name), self._settings[name])
        self._generate()
        self.state.wait_for_everyone()
        self._score()
        self.state.wait_for_everyone()
        self.state.destroy_process_group()
        return summarise_learned_motion(self) if self.state.is_main_process else None

    def video_path(self, name: str, request: VideoRequest) -> Path:
        """File of a method's video."""
        return self.output / "videos" / name / request.motion / f"{request.key}.mp4"

    def read_frames(self, name: str, request: VideoRequest) -> NDArray[np.uint8]:
        """(T, H, W, 3) of a method's video."""
        return read_video(self.video_path(name, request), self.size, self.num_frames)

    def read_reference(self, motion: str, number: int = 0) -> NDArray[np.uint8]:
        """(T, H, W, 3) of a window of a motion's reference clips."""
        parts = [part.permute(1, 2, 3, 0).numpy() for part in read_frames(self.references[motion][number])]
        return np.concatenate(parts)

    def read_scores(self, name: str, motion: str) -> list[dict[str, Any]]:
        """Metrics of each video of a method for a motion, with motion and prompt, in the order of the requests."""
        return [
            {**json.loads(self._score_path(name, request).read_text()), "motion": motion, "prompt": request.prompt}
            for request in self.requests[motion]
        ]

    # -- before anything is made

    def _prepare(self, name: str, motion: str) -> Inputs:
        """What a method is asked for under a motion, checked; prompt and seed are those of the first video."""
        config, method = self.config, self.config.methods[name].of_motion(motion)
        first = self.requests[motion][0]
        try:
            inputs = prepare(
                SampleJob(
                    model=method.model or config.model or "",
                    motion_lora=method.motion_lora,
                    appearance_lora=method.appearance_lora,
                    noise_prior=method.noise_prior,
                    prompt=first.prompt,
                    image=first.image,
                    negative_prompt=config.negative_prompt,
                    guidance_scale=config.guidance_scale,
                    steps=config.num_inference_steps,
                    few_step=False,
                    num_frames=config.num_frames,
                    width=config.size and config.size[0],
                    height=config.size and config.size[1],
                    seed=[first.seed],
                    device=self.device,
                    dtype=config.dtype,
                )
            )
        except (ValueError, FileNotFoundError) as error:
            raise _name_place(error, f"method {name}, motion {motion}") from None
        # In as few windows as the model takes, so that all methods are alike, whatever their LoRAs learned from.
        num_frames, most = cast(int, inputs.job.num_frames), read_max_frames(inputs.job.model)
        return replace(inputs, job=replace(inputs.job, window_frames=max(2, min(num_frames, most or num_frames))))

    def _find_references(self, name: str) -> list[ReferenceClip]:
        """The reference clips of a motion, in adjacent windows of as many frames as the videos have."""
        config = self.config
        try:
            clips = find_reference_clips(
                config.motions[name].references,
                prompt=name,  # no caption is needed
                captions=None,
                size=self.size,
                num_frames=self.num_frames,
                fps=config.fps,
                frame_step=config.frame_step,
            )
        except (ValueError, FileNotFoundError) as error:
            raise _name_place(error, f"references of motion {name}") from None
        if image := next((clip for clip in clips if clip.is_image), None):
            raise ValueError(f"references of motion {name}: {image.path} is an image, which has no motion; give videos")
        return [
            replace(clip, frames=clip.frames[start : start + self.num_frames])
            for clip in clips
            for start in range(0, len(clip.frames) - self.num_frames + 1, self.num_frames)
        ]

    def _settle(self, name: str) -> dict[str, Any]:
        """What a method's videos are made with; refuses to go on with videos that were made with other settings."""
        jobs = {motion: self._inputs[name, motion].job for motion in self.requests}
        settings = _collect_settings(self.config.methods[name], jobs)
        return merge_with_record(locate_record(self.output, name), settings)

    # -- videos

    def _generate(self) -> None:
        batches = list(self._list_missing())
        pipe, loaded = None, None
        for name, motion, batch in show_progress(self.state, batches, "videos"):
            inputs = self._inputs[name, motion]
            # What the pipeline depends on.
            alone = replace(inputs.job, prompt="", seed=[0], noise_prior=None, image=None)
            if pipe is None or alone != loaded:
                pipe = None  # Two of them may be more than the memory holds.
                pipe, loaded = load_pipeline(inputs.job), alone
                pipe.set_progress_bar_config(disable=True)
            started = time.perf_counter()
            videos = render(pipe, [self._of_request(inputs, request) for request in batch])
            seconds = (time.perf_counter() - started) / len(batch)
            for request, (video,) in zip(batch, videos, strict=True):
                path = self.video_path(name, request)
                facts = {"prompt": request.prompt, "seed": request.seed, "seconds": round(seconds, 3)}
                keep_video(path, upscale_for_viewing(video)[0], facts)

    def _of_request(self, inputs: Inputs, request: VideoRequest) -> Inputs:
        """What a method is asked for under a motion, for one video."""
        job = replace(inputs.job, prompt=request.prompt, seed=[request.seed], image=request.image)
        return replace(inputs, job=job, image=None if request.image is None else self._images[request.image])

    def _list_missing(self) -> Iterator[tuple[str, str, list[VideoRequest]]]:
        """Batches of this process's part of the videos that are not there, of one method and motion each."""
        jobs = [job for job in self._own_jobs() if not self.video_path(*job).exists()]
        for (name, motion), group in itertools.groupby(jobs, key=lambda job: (job[0], job[1].motion)):
            while batch := [request for _, request in itertools.islice(group, self.config.batch_size)]:
                yield name, motion, batch

    def _own_jobs(self) -> list[tuple[str, VideoRequest]]:
        """This process's part of all videos: method and request."""
        requests = [request for listed in self.requests.values() for request in listed]
        return own_part(self.state, [(name, request) for name in self.config.methods for request in requests])

    # -- scores

    def _track_references(self) -> None:
        """Tracks the reference windows of the motions of which something is to be measured."""
        needed = {request.motion for name, request in self._own_jobs() if not self._is_scored(name, request)}
        windows = [
            (name, number) for name in self.requests if name in needed for number in range(len(self.references[name]))
        ]
        for name, number in show_progress(self.state, windows, "reference clips: tracks"):
            tracks = track_grid(self.read_reference(name, number), self.tracker, self.config.grid)
            self._tracks.setdefault(name, []).append(tracks)
        for name, found in self._tracks.items():
            if not any(tracks.moving(self.config.still_fraction).any() for tracks in found):
                raise ValueError(
                    f"references of motion {name}: {self.tracker.name} follows nothing that moves by more than "
                    f"{self.config.still_fraction:g} of the diagonal; lower still_fraction for small motions, take "
                    "cotracker or more fps for fast ones, a finer grid for small objects, or leave the motion out"
                )

    def _score(self) -> None:
        jobs = [job for job in self._own_jobs() if not self._is_scored(*job)]
        for name, request in show_progress(self.state, jobs, "scores"):
            score = self._measure(self.read_frames(name, request), request)
            facts = json.loads(self.video_path(name, request).with_suffix(".json").read_text())
            measured_with = self._identify(name, request)
            write_score(
                self._score_path(name, request), request.key, {**score, "seconds": facts["seconds"]}, measured_with
            )

    def _measure(self, frames: NDArray[np.uint8], request: VideoRequest) -> dict[str, Any]:
        """Metrics of one video (T, H, W, 3); those of an instrument that fails are absent, and `failed` has the reason.

        motion_fidelity, clip_text, clip_consistency: in [-1, 1].  pick_score.
        moving_fraction: of the tracks.  tracked_fraction: of the tracks' steps.
        """
        score: dict[str, Any] = {}

        def measure_motion() -> None:
            still, choice = self.config.still_fraction, self.config.reference_choice
            tracks = track_grid(frames, self.tracker, self.config.grid)
            score["motion_fidelity"] = fidelity_to_references(self._tracks[request.motion], tracks, choice, still)
            score["moving_fraction"] = float(tracks.moving(still).mean())
            score["tracked_fraction"] = tracks.tracked_fraction

        def measure_clip() -> None:
            if self.clip is not None:
                score["clip_text"], score["clip_consistency"] = self.clip(frames, request.prompt)

        def measure_preference() -> None:
            if self.pick is not None:
                score["pick_score"] = self.pick(frames, request.prompt)

        instruments = {"tracker": measure_motion, "clip": measure_clip, "pick_score": measure_preference}
        return score | run_instruments(instruments)

    def _score_path(self, name: str, request: VideoRequest) -> Path:
        return self.output / "scores" / name / request.motion / f"{request.key}.json"

    def _is_scored(self, name: str, request: VideoRequest) -> bool:
        """Whether there is a complete score of the video by these instruments and references."""
        return self.video_path(name, request).exists() and is_scored(
            self._score_path(name, request), self._identify(name, request)
        )

    def _identify(self, name: str, request: VideoRequest) -> dict[str, Any]:
        """The video, and all that its score depends on."""
        config = self.config
        settings = ("grid", "still_fraction", "reference_choice", "clip", "frame_pairs", "pick_score")
        return {
            "video": identify_file(self.video_path(name, request)),
            "references": self._windows[request.motion],
            "tracker": f"{self.tracker.name} {self.tracker.version}",
            **{setting: getattr(config, setting) for setting in settings},
        }


def _name_place(error: Exception, place: str) -> ValueError | FileNotFoundError:
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return kind(f"{place}: {error}")


def _collect_settings(method: LearnedMethod, jobs: Mapping[str, SampleJob]) -> dict[str, Any]:
    """All that a method's videos of learned motions depend on but prompt and seed; weights by size and date.

    Args:
        method: The method, whose model is one for all motions or has {motion} in its path.
        jobs: By motion, as `prepare` gives them.
    """
    kept = ("negative_prompt", "guidance_scale", "steps", "width", "height", "num_frames", "dtype")
    settings: dict[str, Any] = {"protocol": "learned_motion"}
    for name, job in jobs.items():
        filled = method.of_motion(name)
        loras = [Path(find_lora(text, "motion")[0]) for text in filled.motion_lora]
        loras += [Path(find_lora(text, "appearance")[0]) for text in filled.appearance_lora]
        priors = [] if filled.noise_prior is None else [parse_noise_prior(filled.noise_prior)[0] / NOISE_PRIOR_NAME]
        files = [file for path in (*loras, *priors) for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        settings[f"{MOTION}{name}"] = {
            "method": asdict(filled) | {"model": job.model},
            "weights": describe_files([*list_weights(Path(job.model)), *files]),
            **{key: getattr(job, key) for key in kept},
            **describe_few_steps(job),
        }
    return json.loads(json.dumps(settings, default=str))
