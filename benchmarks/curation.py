"""CPU time of each step of the curation in one thread, compared with decoding the footage alone.

python benchmarks/curation.py                  # generated footage: 336p and 720p, 18 s, like WebVid's previews
python benchmarks/curation.py --videos FOLDER  # your own footage
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.cuts import find_scenes
from imageconductor.curation.footage import Limits, decode_mp4, read_frames
from imageconductor.curation.motion_score import motion_scores
from imageconductor.curation.sources import Source
from imageconductor.curation.steps import CUT_SIDE_PX, annotate, scan
from imageconductor.data.videos import VIDEO_SUFFIXES

_SECONDS = 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder of footage; without it, footage is generated")
    parser.add_argument("--count", type=int, default=5, help="number of videos of each size")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.videos is not None:
            paths = [path for path in sorted(args.videos.rglob("*")) if path.suffix.lower() in VIDEO_SUFFIXES]
            kinds = {"yours": paths[: args.count]}
        else:
            kinds = {f"{w}x{h}": make_videos(Path(folder), args.count, (w, h)) for w, h in ((596, 336), (1280, 720))}
        for kind, paths in kinds.items():
            print_report(kind, paths)


def make_videos(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Panning textures with grain, as H.264 at 30 frames per second with a cut every 10 s."""
    random = np.random.default_rng(0)
    grain = random.normal(0, 4, (8, size[1], size[0], 3)).astype(np.float32)
    paths = []
    for number in range(count):
        path = folder / f"{size[0]}-{number}.mp4"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("libx264", rate=30, options={"crf": "23", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            for t in range(30 * _SECONDS):
                if t % (10 * _SECONDS) == 0:
                    coarse = random.uniform(0, 255, (24, 36, 3)).astype(np.float32)
                    picture = cv2.resize(coarse, (size[0] * 2, size[1] * 2), interpolation=cv2.INTER_CUBIC)
                left = t % (10 * _SECONDS)
                shown = picture[left : left + size[1], left : left + size[0]] + grain[t % len(grain)]
                frame = av.VideoFrame.from_ndarray(shown.clip(0, 255).astype(np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        paths.append(path)
    return paths


def print_report(kind: str, paths: list[Path]) -> None:
    """Prints the CPU seconds per clip of each step."""
    config = CurateConfig("", "", min_motion=0)
    seconds: dict[str, list[float]] = defaultdict(list)
    sizes, skipped = [], 0

    def measure(step: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        result = function(*arguments)
        seconds[step].append(time.process_time() - start)
        return result

    for path in paths:
        measure("decode alone", decode, path)
        measure("decode, shrink, find cuts", find_cuts, path, config)
        row, files = measure("scan: the same, then read and encode", scan, Source(path.name, str(path)), config)
        if not files:
            skipped += 1
            continue
        clip = measure("decode the clip", decode_mp4, files["mp4"])
        measure("motion score (DIS)", motion_scores, [clip], config)
        measure("annotate: decode, tracks (Lucas-Kanade)", annotate, [(row, files)], config)
        sizes.append(len(files["mp4"]))
    total = sum(float(np.mean(seconds[name])) for name in seconds if name.startswith(("scan", "motion", "annotate")))
    print(f"\n{kind}: {len(paths)} videos, {skipped} without a clip; clips of {np.mean(sizes) / 1e3:.0f} kB")
    print(f"{'step':42} {'s a clip':>9} {'clips/s/core':>13}")
    for name, values in seconds.items():
        print(f"{name:42} {np.mean(values):9.3f} {1 / np.mean(values):13.1f}")
    print(f"{'all':42} {total:9.3f} {1 / total:13.1f}")


def decode(path: Path) -> None:
    """Decodes every frame of a video."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for _ in container.decode(video=0):
            pass


def find_cuts(path: Path, config: CurateConfig) -> None:
    """The first part of `scan`."""

    def reduce(size: tuple[int, int]) -> tuple[int, int]:
        return round(size[0] * CUT_SIDE_PX / min(size)), round(size[1] * CUT_SIDE_PX / min(size))

    find_scenes((picture for _, picture in read_frames(path, reduce, Limits(1, 8192))), config)


if __name__ == "__main__":
    main()
