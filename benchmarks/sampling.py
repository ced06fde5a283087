"""Times a guided step on random weights: the schedule of this package beside that of the published release.

    python benchmarks/sampling.py --size mid --videos 8 --control object --camera-free-scale 1.5

Rows: "published" evaluates both ControlNets and the whole UNet for each video on the doubled batch (two such passes for
Eq. 5), "shared" is what the pipeline does, "kept" is "shared" with the ControlNet outputs of an earlier call
(`residual_cache`). They take turns in one process, and ratios are those of medians. CPU time is that of all threads.
What "shared" does once a call, merging LoRAs, is the time of "preparation".
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from published_schedule import published_step
from random_networks import SIZES, Size, build_networks
from sampling_memory import LiveBytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from imageconductor.devices import resident_peak_bytes
from imageconductor.models.denoiser import Condition, Denoiser
from imageconductor.sampling.branches import Control, GuidedDenoiser, Text, plan
from imageconductor.sampling.residual_cache import CallCache, ResidualCache

T_STEP = 500  # the timestep; all cost the same


def build_inputs(
    size: Size, videos: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, dict[Text, Condition]]:
    """x_t (B, C, T, h, w), and the condition of one video for each text."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    (height, width), frames = size.latent, size.frames
    keyframes, mask = draw(1, 4, frames, height, width), torch.zeros(1, 1, frames, height, width).to(device, dtype)
    mask[:, :, 0] = 1
    flow = draw(1, 2, frames, 8 * height, 8 * width)
    keyframes = keyframes * mask
    uncond, prompt = (Condition(draw(1, *size.text), keyframes, mask, flow) for _ in range(2))
    conditions: dict[Text, Condition] = {"uncond": uncond, "prompt": prompt}
    return draw(videos, 4, frames, height, width), conditions


def build_steps(
    args: argparse.Namespace, denoiser: Denoiser, inputs: Any
) -> tuple[dict[str, Callable[[], Tensor]], float]:
    """A step of each schedule that is asked for, and the CPU seconds that "shared" takes once a call."""
    x_t, conditions = inputs
    t, control = torch.tensor(T_STEP, device=x_t.device), Control(args.control)
    steps: dict[str, Callable[[], Tensor]] = {}
    if args.schedule in ("published", "both"):
        scales = args.guidance_scale, args.camera_free_scale
        steps["published"] = lambda: published_step(denoiser, x_t, t, conditions, control, *scales)
    if args.schedule == "published":
        return steps, 0.0
    branches = plan(control, args.guidance_scale, args.camera_free_scale)
    start = time.process_time()
    shared = GuidedDenoiser(denoiser, branches, conditions)
    shared.prepare()
    preparation = time.process_time() - start
    call = CallCache(ResidualCache(max_bytes=2**40), denoiser, [T_STEP])
    kept = GuidedDenoiser(denoiser, branches, conditions, call)
    kept(x_t, t)
    return {**steps, "shared": lambda: shared(x_t, t), "kept": lambda: kept(x_t, t)}, preparation


@dataclass
class Timing:
    """Of one schedule: medians in seconds, counted work, and the most memory that a step holds beside the weights."""

    wall_s: float
    cpu_s: float
    flop: float
    peak_bytes: int


def measure(steps: dict[str, Callable[[], Tensor]], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Timings of steps that take turns, after one of each that counts."""
    counted: dict[str, tuple[float, int]] = {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as flops, LiveBytes() as memory:
            step()
        counted[name] = flops.get_total_flops(), memory.peak
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            counted[name] = counted[name][0], torch.cuda.max_memory_allocated() - before
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    timings: dict[str, Timing] = {}
    for name, taken in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*taken, strict=True))
        timings[name] = Timing(wall, cpu, *counted[name])
    return timings


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large matrix product on a GPU."""
    side = 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    for _ in range(3):
        torch.mm(a, a)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        torch.mm(a, a)
    torch.cuda.synchronize()
    return 10 * 2 * side**3 / (time.perf_counter() - start)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--videos", type=int, default=1, metavar="N", help="videos of one condition (1)")
    parser.add_argument("--control", choices=[one.value for one in Control], default="object")
    parser.add_argument("--guidance-scale", type=float, default=8.5)
    parser.add_argument("--camera-free-scale", type=float, metavar="X", help="Eq. 5; default: classifier-free guidance")
    parser.add_argument("--schedule", choices=("shared", "published", "both"), default="both")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as the pipeline's `compile`")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each schedule (5)")
    parser.add_argument("--json", type=Path, metavar="F", help="writes the figures to a file, too")
    return parser.parse_args()


def compile_networks(denoiser: Denoiser) -> None:
    """As the pipeline compiles them."""
    unet: Any = denoiser.unet
    unet.encode, unet.decode = torch.compile(unet.encode), torch.compile(unet.decode)
    denoiser.image_controlnet.compile()
    denoiser.motion_controlnet.compile()


@torch.no_grad()
def main() -> None:
    """Prints a table."""
    args = parse_arguments()
    device, dtype, size = torch.device(args.device), getattr(torch, args.dtype), SIZES[args.size]
    denoiser = build_networks(size, device, dtype)
    if args.compile:
        compile_networks(denoiser)
    steps, preparation = build_steps(args, denoiser, build_inputs(size, args.videos, device, dtype))
    timings = measure(steps, args.repeats, device)
    report: dict[str, Any] = {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}
    report |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "preparation_cpu_s": preparation}
    report["resident_peak_bytes"] = resident_peak_bytes()
    report["schedules"] = {name: asdict(timing) for name, timing in timings.items()}
    print("| schedule | wall, s | CPU, s | TFLOP | peak, MB | wall / published | CPU / published |")
    print("|---|---|---|---|---|---|---|")
    base = timings.get("published")
    for name, one in timings.items():
        ratios = ["", ""] if base is None else [f"{one.wall_s / base.wall_s:.2f}", f"{one.cpu_s / base.cpu_s:.2f}"]
        values = (f"{one.wall_s:.3f}", f"{one.cpu_s:.3f}", f"{one.flop / 1e12:.4f}", f"{one.peak_bytes / 1e6:.0f}")
        print(f"| {name} | {' | '.join((*values, *ratios))} |")
    print(f"preparation of a call: {preparation:.3f} s CPU")
    if device.type == "cuda":
        rate = report["matrix_flop_per_s"] = matrix_rate(device, dtype)
        for name, one in timings.items():
            print(f"{name}: {100 * one.flop / one.wall_s / rate:.0f} % of {rate / 1e12:.0f} TFLOP/s")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
