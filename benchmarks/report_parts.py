"""The parts of the report on a GPU, each in a process of its own, which prints a line of JSON for each row.

    python benchmarks/report_parts.py --part decoding --size full --device cuda

What a part has printed before it fails, or before its time is over, stays in the report.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from random_networks import SIZES, Size, build_model, build_networks
from sampling import build_inputs, build_steps, compile_networks, matrix_rate, measure
from training import Turns, build_config, build_stage, peak_of, run_ours, write_cache

from imageconductor.conditioning import Trajectories
from imageconductor.data.batches import Batches
from imageconductor.devices import has_instructions
from imageconductor.sampling.pipeline import ImageConductorPipeline
from imageconductor.training.loop import leave, place, train

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
"""A row of a part's table: names with their units, and values."""

_CAMERA_FREE_SCALE = 1.5
_PORT = "29541"


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        title: Shown above its table.
        limit_s: Most seconds that it may take of a report of eight minutes.
        rows: Gives its rows one by one, as they are measured.
    """

    title: str
    limit_s: float
    rows: Callable[[Size, torch.device], Iterator[Row]]


def gpu_test_rows(_: Size, device: torch.device) -> Iterator[Row]:
    """How the tests that need a GPU end."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if missing := [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]:
        yield {"tests": f"not run: {' and '.join(missing)} not installed"}
        return
    if device.type != "cuda":
        yield {"tests": f"not run: those of {len(files)} files need CUDA"}
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:]
    yield {"tests": "".join(last), "exit code": done.returncode}
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])


def sampling_rows(dtype: torch.dtype, compiles: bool, size: Size, device: torch.device) -> Iterator[Row]:
    """A guided step: one video and four, classifier-free and Eq. 5, our schedules and the published one beside them."""
    dtype = _computed(dtype, device)
    rate = matrix_rate(device, dtype) if device.type == "cuda" else None
    denoiser = build_networks(size, device, dtype)
    for videos in (1, 4):
        for scale in (None, _CAMERA_FREE_SCALE):
            if compiles:  # anew, or shapes that change would be compiled as dynamic ones
                torch.compiler.reset()
                denoiser = build_networks(size, device, dtype)
                compile_networks(denoiser)
            schedule = "shared" if compiles else "both"  # The published one would be compiled again for its text.
            settings = {"control": "object", "guidance_scale": 8.5, "camera_free_scale": scale, "schedule": schedule}
            inputs = build_inputs(size, videos, device, dtype)
            start = time.perf_counter()
            with torch.no_grad():
                steps, _ = build_steps(argparse.Namespace(**settings), denoiser, inputs)
                timings = measure(steps, _repeats(device), device)
            for name, timing in timings.items():
                row: Row = {"guidance": "Eq. 5" if scale else "classifier-free", "videos": videos, "schedule": name}
                row |= {"s a step": timing.wall_s, "TFLOP": timing.flop / 1e12}
                row["peak beside the weights, GB"] = timing.peak_bytes / 1e9
                if "published" in timings:
                    row["to published"] = timing.wall_s / timings["published"].wall_s
                if rate is not None:
                    row["of matrix rate"] = timing.flop / timing.wall_s / rate
                yield row | {"s in all": time.perf_counter() - start}


def decoding_rows(size: Size, device: torch.device) -> Iterator[Row]:
    """The autoencoder's decoding of a video, some frames at a time."""
    dtype = _computed(torch.float16, device)
    vae: Any = build_model(size, device, dtype).vae
    latents = torch.randn(size.frames, 4, *size.latent, device=device, dtype=dtype)
    for frames in dict.fromkeys((size.frames, 4, 1)):

        def decode(frames: int = frames) -> None:
            with torch.no_grad():
                for chunk in latents.split(frames):
                    vae.decode(chunk)

        decode()
        times = [_seconds(decode, device) for _ in range(_repeats(device))]
        row: Row = {"frames at a time": frames, "s a video": statistics.median(times)}
        yield row | {"peak beside the weights, GB": peak_of(lambda decode=decode: decode, device) / 1e9}


def call_rows(offload: str, size: Size, device: torch.device) -> Iterator[Row]:
    """A call of the pipeline for one video with Eq. 5, under a way of keeping networks off the GPU."""
    if offload == "sequential" and device.type == "cpu":
        yield {"offload": "not run: accelerate moves layers to a GPU alone"}
        return
    networks = build_model(size, device, _computed(torch.float16, device))
    if offload != "none":
        for network in networks.modules.values():
            torch.nn.Module.to(network, "cpu")
    gc.collect()
    (width, height), steps = size.pixels, _repeats(device) + 1
    defaults = {"width": width, "height": height, "num_frames": size.frames, "num_inference_steps": steps}
    pipe = ImageConductorPipeline(**networks.parts, sampling_defaults=defaults)
    del networks
    pipe.set_progress_bar_config(disable=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    ends: list[float] = []

    def end_step(*_: Any) -> dict[str, Any]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return {}

    track = torch.linspace(0.25, 0.75, size.frames)[None, :, None] * torch.tensor([width, height])
    drawn = Trajectories(track, torch.ones(1, size.frames, dtype=torch.bool), (width, height))
    image = Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy())
    start = time.perf_counter()
    pipe(
        image=image,
        trajectories=drawn,
        prompt="a red circle",
        camera_free_scale=_CAMERA_FREE_SCALE,
        control="object",
        seed=0,
        output_type="np",
        callback_on_step_end=end_step,
    )
    row: Row = {"offload": offload, "s a step": (ends[-1] - ends[0]) / (len(ends) - 1)}
    row |= {"steps": steps, "s a call": time.perf_counter() - start}
    if device.type == "cuda":
        row["peak, GB"] = torch.cuda.max_memory_allocated() / 1e9
    yield row


def training_rows(name: str, size: Size, device: torch.device) -> Iterator[Row]:
    """Steps of a stage at its shipped settings, from cached latents, and once from clips rendered on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(_training_arguments(name, device), size, Path(folder), device)
        write_cache(Path(folder) / "cache", size)
        cached = replace(config, data=[str(Path(folder) / "cache")], held_out_clips=1)
        sources = {"cached latents": cached, **({"sprite clips": config} if name == "camera_lora" else {})}
        for source, own in sources.items():
            turns, waited = Turns({}, _repeats(device), device), []

            def build(own: Any = own, turns: Turns = turns, waited: list[float] = waited) -> Callable[[], Any]:
                stage = build_stage(own, size, device)
                place(stage, own, device)  # else the peak were that of weights in float32
                return lambda: waited.append(run_ours(stage, own, turns))

            peak = peak_of(build, device)
            ((wall, _),) = turns.medians().values()
            clips = own.batch_size * own.gradient_accumulation_steps
            row: Row = {"stage": name, "clips": source, "clips a step": clips, "precision": own.mixed_precision}
            row |= {"s a step": wall, "clips/s": clips / wall, "loading": waited[0] / wall, "peak, GB": peak / 1e9}
            yield row


def fsdp_rows(size: Size, device: torch.device) -> Iterator[Row]:
    """Steps of the camera LoRA under FSDP, in one process as a launcher would start it."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _PORT}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder) / "cache", size)
        config = build_config(_training_arguments("camera_lora", device), size, Path(folder), device)
        steps = _repeats(device) + 1
        settings = {"max_steps": steps, "save_every": steps, "preview_every": 0}
        config = replace(config, data=[str(Path(folder) / "cache")], held_out_clips=1, **settings)

        def build() -> Callable[[], Any]:
            stage = build_stage(config, size, device)
            place(stage, config, device)
            return lambda: train(stage, Batches(stage.build_samples(config), config.batch_size), config)

        peak = peak_of(build, device)
        lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
        seconds = statistics.median(line["seconds"] for line in lines[1:])
        yield {"stage": config.stage, "s a step": seconds, "loss": lines[-1]["denoising"], "peak, GB": peak / 1e9}
    leave()


def _training_arguments(name: str, device: torch.device) -> argparse.Namespace:
    path = ROOT / "configs" / "train" / f"{name}.yaml"
    dtype = None if _computed(torch.bfloat16, device) == torch.bfloat16 else "float32"
    settings = {"dtype": dtype, "compile": False, "repeats": _repeats(device), "overrides": []}
    return argparse.Namespace(config=path, stage=None, **settings)


def _computed(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float32 on a CPU that would imitate it, where the report is only tried."""
    return dtype if device.type == "cuda" or has_instructions(dtype, device) else torch.float32


def _repeats(device: torch.device) -> int:
    """How often a step is timed: once on a CPU, where the report is only tried."""
    return 3 if device.type == "cuda" else 1


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_STAGES = ("motion_controlnet_dense", "camera_lora", "object_lora")  # The sparse stage costs what the dense one does.


def _sampling(name: str, compiles: bool) -> Part:
    title = f"A guided step, {name}, {'compiled' if compiles else 'eager'}"
    return Part(title, 240 if compiles else 120, partial(sampling_rows, _DTYPES[name], compiles))


PARTS: dict[str, Part] = {
    "tests": Part("Tests that need a GPU", 60, gpu_test_rows),
    "sampling-float16": _sampling("float16", compiles=False),
    "decoding": Part("Decoding a video, float16", 45, decoding_rows),
    **{f"call-{o}": Part(f"A call, float16, offload {o}", 60, partial(call_rows, o)) for o in ("none", "model")},
    **{f"training-{stage}": Part(f"Training, {stage}", 60, partial(training_rows, stage)) for stage in _STAGES},
    "fsdp": Part("FSDP on one process", 60, fsdp_rows),
    "call-sequential": Part("A call, float16, offload sequential", 60, partial(call_rows, "sequential")),
    "sampling-bfloat16": _sampling("bfloat16", compiles=False),
    "sampling-float16-compiled": _sampling("float16", compiles=True),
    "sampling-bfloat16-compiled": _sampling("bfloat16", compiles=True),
}
"""Parts by name, in the order in which they are run: what tells most comes before the time is over."""


def main() -> None:
    """Runs a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    for row in PARTS[args.part].rows(SIZES[args.size], torch.device(args.device)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
