"""Measures videos of several windows on held-out sprite scenes, each of which really moves as it is asked to.

    python benchmarks/long_videos.py --frames 16 32 64 --scenes 8

A line for each number of frames and each overlap: the control error in each quarter of the video (pixels, over all
points, and as a fraction of that of a motionless video), the fraction of points that the tracker follows, the seam (the
difference between frames where two windows are joined, divided by that elsewhere; the true clips' stands beside it),
and seconds of CPU for each frame. `--sheet FOLDER` writes a contact sheet of each line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imageconductor.data.trackers import LucasKanadeTracker
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
from imageconductor.evaluation.drawn_motion.requests import Request, build_requests
from imageconductor.evaluation.drawn_motion.scores import measure
from imageconductor.sampling.pipeline import ImageConductorPipeline
from imageconductor.sampling.video import contact_sheet, draw_trajectories, to_uint8
from imageconductor.sampling.windows import split_frames

QUARTERS = 4


def measure_quarters(request: Request, score: dict[str, Any]) -> tuple[NDArray, NDArray]:
    """Control error in pixels in each quarter of a video, and that of a motionless video."""
    requested, visible = request.trajectories.points.numpy(), request.trajectories.visible.numpy()
    distances = np.linalg.norm(requested - np.asarray(score["tracked"]), axis=-1)
    still = np.linalg.norm(requested - requested[:, :1], axis=-1)
    parts = np.array_split(np.arange(1, requested.shape[1]), QUARTERS)
    means = [[np.nanmean(np.where(visible, x, np.nan)[:, part]) for part in parts] for x in (distances, still)]
    return np.array(means[0]), np.array(means[1])


def measure_seam(video: NDArray[np.uint8], windows: tuple[range, ...]) -> float:
    """Mean difference between frames where two windows are joined, divided by that elsewhere; NaN for one window."""
    changes = np.abs(np.diff(video.astype(np.float64), axis=0)).mean(axis=(1, 2, 3))
    joined = np.zeros(len(changes), bool)
    for before, after in itertools.pairwise(windows):
        joined[after.start : before.stop] = True
    return float(changes[joined].mean() / changes[~joined].mean()) if joined.any() else float("nan")


def measure_line(pipe: Any, kind: Any, num_frames: int, args: argparse.Namespace, overlap: int | None) -> dict:
    """Figures of one number of frames and one overlap."""
    defaults = pipe.sampling_defaults
    config = EvaluateConfig(model=str(args.model), motions="own", num_scenes=args.scenes)
    requests = build_requests(config, kind, (defaults["width"], defaults["height"]), num_frames)
    windows = split_frames(num_frames, args.window or defaults["num_frames"], overlap)
    tracker, scores, seams, truths, rows = LucasKanadeTracker(), [], [], [], []
    seconds = 0.0
    for request in requests:
        began = time.process_time()
        made = pipe(
            _to_image(request.image),
            request.trajectories,
            request.prompt,
            control=kind,
            num_frames=num_frames,
            window_frames=args.window,
            window_overlap=overlap,
            num_inference_steps=args.steps,
            seed=request.seed,
            output_type="np",
        )
        seconds += (time.process_time() - began) / len(requests) / num_frames
        video = to_uint8(made.frames[0])
        rows.append((request.prompt, draw_trajectories(video, request.trajectories)))
        scores.append((request, measure(request, video, tracker)))
        seams.append(measure_seam(video, windows))
        truths.append(measure_seam(request.truth, windows) if request.truth is not None else float("nan"))
    if args.sheet is not None:
        args.sheet.mkdir(parents=True, exist_ok=True)
        contact_sheet(args.sheet / f"{kind}-{num_frames}-{overlap}.png", rows, columns=9)
    quarters = [measure_quarters(request, score) for request, score in scores]
    error, still = (np.mean([pair[i] for pair in quarters], axis=0) for i in (0, 1))
    return {
        "set": kind,
        "frames": num_frames,
        "windows": len(windows),
        "overlap": None if len(windows) == 1 else windows[0].stop - windows[1].start,
        "error_px": error.round(2).tolist(),
        "of_motionless": (error / still).round(2).tolist(),
        "tracked": round(float(np.mean([score["tracked_fraction"] for _, score in scores])), 2),
        "seam": round(float(np.mean(seams)), 2),
        "seam_of_true_clips": round(float(np.mean(truths)), 2),
        "cpu_seconds_a_frame": round(seconds, 2),
    }


def _to_image(array: NDArray[np.uint8]) -> Any:
    from PIL import Image

    return Image.fromarray(array)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/sprites"))
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--sets", nargs="+", choices=["camera", "object"], default=["camera", "object"])
    parser.add_argument("--window", type=int, help="frames of a window; default: the model's number")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[None], help="default: a quarter of a window")
    parser.add_argument("--scenes", type=int, default=8, help="held-out scenes of each set (8)")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's")
    parser.add_argument("--sheet", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    pipe = ImageConductorPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    for kind in args.sets:
        for num_frames in args.frames:
            for overlap in args.overlaps:
                print(json.dumps(measure_line(pipe, kind, num_frames, args, overlap)), flush=True)


if __name__ == "__main__":
    main()
