"""Times training steps on random weights: the loop of this package beside a plain one.

    python benchmarks/training.py --size mid --stage camera_lora [key=value ...]

Rows: "plain" keeps everything under autograd, and in each step encodes clips and captions, takes pixels as float32 and
the text once a frame; "frozen" is "plain" with autograd off where nothing learns; "clips" is `training.loop.train`, and
"cached" the same on latents and texts that were encoded before (scripts/cache_latents.py). A plain step follows each
of ours in one process, and ratios are those of medians: of "cached" to the "plain" steps that took turns with it. Clips
are those of the sprite world, rendered on the CPU; no step accumulates. CPU time is that of all threads. The peak
counts weights, gradients, moments and activations.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from plain_training import PlainLoop
from random_networks import SIZES, Size, build_model
from sampling_memory import LiveBytes

from imageconductor.data.batches import Batches
from imageconductor.data.clip_records import encode_tracks
from imageconductor.data.sprite_world import SpriteSet, SpriteWorldConfig
from imageconductor.devices import choose_precision
from imageconductor.files import find_shipped
from imageconductor.models.adapters import Adapter, adapter_parameters, add_adapter, save_adapter
from imageconductor.models.controlnets import MotionControlNet
from imageconductor.training.loop import place, train
from imageconductor.training.stage_configs import load_config
from imageconductor.training.stages.base import Stage
from imageconductor.training.stages.registry import find_stage
from imageconductor.training.train_config import TrainConfig

STAGES = ("motion_controlnet", "camera_lora", "object_lora")
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_CLIPS = 8  # in a cache


@dataclass
class Ratios:
    """Of one loop to "plain", with which its steps took turns."""

    wall: float
    cpu: float
    peak: float


@dataclass
class Timing:
    """Of a step of one loop: medians in seconds, and the most bytes that are held at a time."""

    wall_s: float
    cpu_s: float
    loading_fraction: float  # of the wall-clock time, spent waiting for clips
    clips_per_s: float
    peak_bytes: int
    ratios: Ratios | None


class EnoughSteps(BaseException):  # An Exception would be passed over as a failing preview.
    """Ends `train` without its files."""


class Turns:
    """Takes steps of other loops after each step of `train`, which calls it as its preview, and times all of them.

    Args:
        others: Steps by the name of their loop.
        repeats: Steps of each that are timed, after one that is not.
        device: Whose work is waited for.
    """

    def __init__(self, others: Mapping[str, Callable[[int], Any]], repeats: int, device: torch.device):
        self.others, self.repeats, self.device = others, repeats, device
        self.times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("ours", *others)}
        self.start: tuple[float, float] | None = None

    def __call__(self, step: int, _: Any) -> None:
        """Ends a step of ours.

        Raises:
            EnoughSteps: That was the last one.
        """
        if self.start is not None:
            self._end("ours", self.start)
        for name, take_step in self.others.items():
            start = self._now()
            take_step(step)
            if self.start is not None:
                self._end(name, start)
        if len(self.times["ours"]) == self.repeats:
            raise EnoughSteps
        self.start = self._now()

    def medians(self) -> dict[str, tuple[float, float]]:
        """Wall-clock and CPU seconds of each loop's step."""
        return {
            name: (statistics.median(wall for wall, _ in taken), statistics.median(cpu for _, cpu in taken))
            for name, taken in self.times.items()
            if taken
        }

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def _end(self, name: str, start: tuple[float, float]) -> None:
        wall, cpu = self._now()
        self.times[name].append((wall - start[0], cpu - start[1]))


def build_config(args: argparse.Namespace, size: Size, folder: Path, device: torch.device) -> TrainConfig:
    """Settings of the stage: its defaults or those of a YAML file, on sprite clips of the size, with overrides last."""
    width, height = size.pixels
    fixed = [f"mixed_precision={PRECISIONS[args.dtype]}"] if args.dtype else []
    config = load_config(args.config, [*fixed, *args.overrides], args.stage if args.config is None else None)
    if not isinstance(config, TrainConfig) or config.stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {config.stage}")
    changes: dict[str, Any] = {"motion_controlnet": None}
    if config.stage.endswith("_lora"):
        changes["lora_rank"] = size.rank
    if config.stage == "object_lora":
        changes["camera_lora"] = str(folder / "camera_lora")
    is_camera = config.stage == "camera_lora"
    return replace(
        config,
        output=str(folder / "run"),
        data=[],
        held_out_clips=0,
        horizontal_flip=0.0,
        world=SpriteWorldConfig(size=(width, height), num_frames=size.frames, grid=16),
        sets=[SpriteSet.CAMERA if is_camera else SpriteSet.MIXED],
        size=(width, height),
        num_frames=size.frames,
        torch_compile=args.compile,
        mixed_precision=cast(Any, choose_precision(config.mixed_precision, device)),
        max_steps=args.repeats + 2,  # which is not reached: nothing is saved
        log_every=1,
        save_every=args.repeats + 2,
        preview_every=1,
        validation_every=0,
        **changes,
    )


def build_stage(config: TrainConfig, size: Size, device: torch.device) -> Stage:
    """The stage of the settings on random weights, its camera LoRA among them where it needs one, and not placed."""
    model = build_model(size, device, torch.float32, has_loras=False)
    folder = getattr(config, "camera_lora", None)
    if folder is not None and not Path(folder).exists():
        lent: Any = MotionControlNet.from_config(model.motion_controlnet.config)
        add_adapter(lent, Adapter.CAMERA, rank=size.rank)
        for parameter in adapter_parameters(lent, Adapter.CAMERA).values():
            parameter.data.normal_(0, 0.02)
        save_adapter(lent, Adapter.CAMERA, folder)
    return find_stage(config.stage)(model, config)


def write_cache(folder: Path, size: Size) -> None:
    """Clip records of random latents, texts and tracks, twice as long as a training clip, as in the paper."""
    random, (height, width), frames = np.random.default_rng(0), size.latent, 2 * size.frames
    folder.mkdir()
    for number in range(_CLIPS):
        shape = (frames, 4, height, width)
        latents = {name: random.normal(size=shape).astype(np.float16) for name in ("mean", "std")}
        points = np.cumsum(random.normal(size=(256, frames, 2)), axis=1) + np.array(size.pixels) / 2
        arrays = {
            "latents": {**latents, "size": np.array(size.pixels)},
            "text": {"text": random.normal(size=size.text).astype(np.float16)},
        }
        for name, content in arrays.items():
            file = io.BytesIO()
            np.savez(file, **content)
            (folder / f"{number}.{name}.npz").write_bytes(file.getvalue())
        (folder / f"{number}.tracks.npz").write_bytes(encode_tracks(points, np.ones(points.shape[:2], bool)))
        (folder / f"{number}.json").write_text(json.dumps({"caption": "a red circle"}))


def run_ours(stage: Stage, config: TrainConfig, turns: Turns) -> float:
    """Trains until the turns are over; the median seconds in which a step waited for its clips."""
    metrics = Path(config.output) / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    try:
        train(stage, Batches(stage.build_samples(config), config.batch_size), config, turns)
    except EnoughSteps:
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        return statistics.median(line["loading_seconds"] for line in lines[1:])
    raise AssertionError("train has ended before the turns")


def peak_of(build: Callable[[], Callable[[], Any]], device: torch.device) -> int:
    """Most bytes of tensors while the steps that `build` gives are taken, those that it made included."""
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated()
        take_steps = build()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        take_steps()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as memory:
        take_steps = build()
        gc.collect()
        memory.peak = memory.live
        take_steps()
    return memory.peak


def measure(args: argparse.Namespace, config: TrainConfig, size: Size, device: torch.device) -> dict[str, Timing]:
    """Timings by loop, those of ours first."""
    cache = Path(config.output).with_name("cache")
    write_cache(cache, size)
    configs = {"clips": config, "cached": replace(config, data=[str(cache)], held_out_clips=1)}
    plain = {} if args.loop == "ours" else {"plain": False, "frozen": True}

    def build_plain(freezes: bool) -> PlainLoop:
        stage = build_stage(config, size, device)
        return PlainLoop(stage, stage.build_samples(config), config, device, freezes)

    def ours_twice(own: TrainConfig) -> Callable[[], Any]:
        stage, uncompiled = build_stage(own, size, device), replace(own, torch_compile=False)
        place(stage, uncompiled, device)  # else the peak were that of weights in float32
        return lambda: run_ours(stage, uncompiled, Turns({}, 1, device))

    def plain_twice(freezes: bool) -> Callable[[], Any]:
        loop = build_plain(freezes)
        return lambda: [loop.step(number) for number in range(2)]

    peaks = {name: peak_of(partial(ours_twice, own), device) for name, own in configs.items()}
    peaks |= {name: peak_of(partial(plain_twice, freezes), device) for name, freezes in plain.items()}
    timings: dict[str, Timing] = {}
    for name, own in configs.items():
        loops = {other: build_plain(freezes) for other, freezes in plain.items() if name == "clips" or not freezes}
        turns = Turns({other: loop.step for other, loop in loops.items()}, args.repeats, device)
        loading = {"ours": run_ours(build_stage(own, size, device), own, turns)}
        loading |= {other: loop.loading_s / (args.repeats + 1) for other, loop in loops.items()}
        medians = turns.medians()
        base = medians.get("plain")
        for loop, (wall, cpu) in medians.items():
            title = name if loop == "ours" else loop
            ratios = None
            if base is not None:
                ratios = Ratios(wall / base[0], cpu / base[1], peaks[title] / peaks["plain"])
            timing = Timing(wall, cpu, loading[loop] / wall, own.batch_size / wall, peaks[title], ratios)
            timings.setdefault(title, timing)
    return timings


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--stage", choices=STAGES, default="camera_lora")
    parser.add_argument("--config", type=find_shipped, metavar="FILE", help="YAML of a stage, in place of --stage")
    parser.add_argument("--loop", choices=("ours", "both"), default="both")
    parser.add_argument("--dtype", choices=PRECISIONS, help="of the products; default: as the settings say")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as the setting torch_compile")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each loop (5)")
    parser.add_argument("--json", type=Path, metavar="F", help="writes the figures to a file, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes one setting of the stage")
    return parser.parse_intermixed_args()


def main() -> None:
    """Prints a table."""
    args = parse_arguments()
    size, device = SIZES[args.size], Accelerator().device
    with tempfile.TemporaryDirectory() as folder:
        # A plain step is one micro-step.
        config = replace(build_config(args, size, Path(folder), device), gradient_accumulation_steps=1)
        timings = measure(args, config, size, device)
    print("| loop | wall, s | CPU, s | loading | clips/s | peak, MB | wall / plain | CPU / plain | peak / plain |")
    print("|" + "---|" * 9)
    for name, one in timings.items():
        values = [f"{one.wall_s:.3f}", f"{one.cpu_s:.3f}", f"{100 * one.loading_fraction:.0f} %"]
        values += [f"{one.clips_per_s:.2f}", f"{one.peak_bytes / 1e6:.0f}"]
        values += ["", "", ""] if one.ratios is None else [f"{ratio:.2f}" for ratio in asdict(one.ratios).values()]
        print(f"| {name} | {' | '.join(values)} |")
    if args.json is not None:
        report: dict[str, Any] = {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}
        report |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(device)}
        report["loops"] = {name: asdict(timing) for name, timing in timings.items()}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
