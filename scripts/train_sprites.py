"""Builds the bundled model from nothing: autoencoder, foundation, decoder, then stages 1-3 and a style LoRA.

Each part is resumable; run the same command again after an interruption. A finished part is not repeated.

    python scripts/train_sprites.py --config configs/train/sprites.yaml --minutes 8
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 scripts/train_sprites.py --config ... --device cpu
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from omegaconf import OmegaConf
from PIL import Image

from imageconductor.checkpoints.assembly import AssemblyConfig, assemble
from imageconductor.command_line import finite_float, parse_command_line
from imageconductor.commands.assemble import write_model_folder
from imageconductor.conditioning.flow_map import FlowMapConvention
from imageconductor.config import read_yaml
from imageconductor.data.batches import Batches, SpriteSamples, scale_pixels
from imageconductor.data.sprite_world import SpriteSet, SpriteWorldConfig
from imageconductor.data.sprites import caption_words, captions
from imageconductor.evaluation.metrics.motion import psnr
from imageconductor.evaluation.metrics.one_step_error import format_errors, measure_one_step_errors
from imageconductor.files import atomic_folder, atomic_path, check_record, check_writable, write_record, write_text
from imageconductor.models.controlnets import MotionControlNet
from imageconductor.models.networks import Networks
from imageconductor.models.small_model import (
    SmallModelConfig,
    add_full_resolution_attention,
    build_small_model,
    predict_v,
)
from imageconductor.sampling.pipeline import ImageConductorPipeline
from imageconductor.training.autoencoder import AutoencoderConfig, train_autoencoder
from imageconductor.training.loop import leave
from imageconductor.training.run import run_stage
from imageconductor.training.samples import HELD_OUT_SEED
from imageconductor.training.stage_configs import load_config
from imageconductor.training.train_config import TrainConfig


@dataclass
class GpuSettings:
    """What is different where a GPU trains: it wants more clips at once, and other processes to draw them."""

    batch_factor: int = 4  # a phase of the foundation, or a stage, takes so many times the clips a step
    num_workers: int = 12  # processes that draw clips


@dataclass
class SpriteRecipe:
    """Everything about the bundled model."""

    output: str = "models/sprites"  # the finished model folder, fp16
    # Model folder to go on from, its autoencoder kept, its motion ControlNet too if it reads the same flow maps;
    # attention that `model` asks for and it lacks is added, and a model of x_0 becomes one of v, for which no
    # picture is given, if `model.prediction_type` says so. None = random weights.
    start: str | None = None
    runs: str = "runs/sprites"  # working folder: checkpoints and the float32 model
    world: SpriteWorldConfig = field(default_factory=SpriteWorldConfig)
    model: SmallModelConfig = field(default_factory=SmallModelConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    # Further steps of its decoder, which may come at any time, also after `start`; 0 steps = none.
    decoder: AutoencoderConfig = field(default_factory=lambda: AutoencoderConfig(decoder_only=True, max_steps=0))
    foundation: list[str] = field(default_factory=list)  # YAML files of the foundation's phases, in order
    stages: list[str] = field(default_factory=list)  # YAML files of stages 1-3, in order
    # Sampling defaults of the finished model.
    sampling: dict[str, Any] = field(
        default_factory=lambda: {
            "fps": 8,
            "guidance_scale": 1.0,
            "trajectory_guidance_scale": 2.0,
            "negative_prompt": "",
            "num_inference_steps": 25,
        }
    )
    gpu: GpuSettings = field(default_factory=GpuSettings)
    seed: int = 0  # of the random weights


class OutOfTimeError(Exception):
    """The minutes are over, and a part is not finished."""


@dataclass
class Clock:
    """What is left of the minutes that a command may take."""

    minutes: float | None
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float | None:
        """Minutes, more than 0; None without a limit."""
        return None if self.minutes is None else max(1e-6, self.minutes - (time.monotonic() - self.start) / 60)


def main() -> None:
    """Parses the command and builds the model."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument(
        "--budget",
        type=finite_float,
        default=1.0,
        help="scales the steps of every part, e.g. 0.01 output=models/try runs=runs/try to try it",
    )
    extra.add_argument(
        "--minutes", type=finite_float, help="stop after so many; the same command goes on where this one stopped"
    )
    extra.add_argument("--device", choices=("cpu", "cuda"), help="where to train; a GPU if there is one")
    recipe, args = parse_command_line(SpriteRecipe, __doc__ or "", parents=[extra])
    if args.device == "cuda" and not torch.cuda.is_available():
        extra.exit(2, "error: --device cuda: PyTorch finds no CUDA device here\n")
    is_cpu = args.device == "cpu" or not torch.cuda.is_available()
    PartialState(cpu=is_cpu, timeout=timedelta(days=1))  # Some parts are the main process's, while others wait.
    try:
        for folder in (recipe.output, recipe.runs):
            check_writable(Path(folder))
        check_budget(recipe, args.budget)
    except ValueError as error:
        extra.exit(2, f"error: {error}\n")
    try:
        build(recipe, args.budget, Clock(args.minutes))
    except OutOfTimeError as error:
        alone(partial(print, f"{error}; the same command goes on"))
    except (ValueError, FileNotFoundError) as error:
        extra.exit(2, f"error: {error}\n")
    leave()


def check_budget(recipe: SpriteRecipe, budget: float) -> None:
    """Keeps a trial from taking the place of a model, and its parts from being taken for those of a whole run.

    Raises:
        ValueError: A model would be replaced by one of fewer steps, or the working folder has parts of another budget.
    """
    if budget < 1 and Path(recipe.output).exists():
        raise ValueError(
            f"--budget {budget:g} would replace {recipe.output} by a model of fewer steps; name other folders, e.g. "
            "output=models/try runs=runs/try"
        )
    check_record(Path(recipe.runs) / "budget.json", {"budget": budget})


def build(recipe: SpriteRecipe, budget: float, clock: Clock) -> None:
    """Makes what is missing of the model.

    Raises:
        OutOfTimeError: The time was over before.
    """
    runs, model = Path(recipe.runs), Path(recipe.runs) / "model"
    if model.is_dir() and not (model / "model_index.json").is_file():
        raise SystemExit(f"{model} is of an earlier version, or not whole; name other runs=FOLDER, or delete it")
    alone(lambda: write_record(runs / "budget.json", {"budget": budget}))
    alone(lambda: start_model(recipe, model))
    if recipe.start is None:
        train_vae(recipe, recipe.autoencoder, budget, runs / "autoencoder", model, clock)
    train_foundation(recipe, budget, runs, model, clock)
    if recipe.decoder.max_steps:
        train_vae(recipe, recipe.decoder, budget, runs / "decoder", model, clock)
    made = {"motion_controlnet": model / "motion_controlnet"}
    if recipe.start is not None:  # A stage that is not repeated leaves its LoRA as it was.
        adapters = (f"{name}_lora" for name in ("camera", "object", "style"))
        made |= {name: Path(recipe.start) / name for name in adapters if (Path(recipe.start) / name).is_dir()}
    for path in recipe.stages:
        config = stage_config(path, recipe, budget, runs, model)
        wanted = [key for key in ("motion_controlnet", "camera_lora") if hasattr(config, key) and key in made]
        inputs: dict[str, Any] = {key: str(made[key]) for key in wanted}
        train_part(replace(config, **inputs), clock)
        made[config.stage] = Path(config.output) / config.stage
    alone(lambda: finish(recipe, runs, model, made))


def alone(work: Callable[[], object]) -> None:
    """Lets the main process work while the others wait for it."""
    if PartialState().is_main_process:
        work()
    PartialState().wait_for_everyone()


def has_gpu() -> bool:
    """Whether this process trains on a GPU."""
    device = PartialState().device
    return device is not None and device.type == "cuda"


def train_part(config: TrainConfig, clock: Clock) -> None:
    """Trains a stage, the clips of a step shared by the processes.

    Raises:
        OutOfTimeError: The time was over before its end.
    """
    state = run_stage(replace(config, max_minutes=clock.left()))
    if state.step < config.max_steps:
        raise OutOfTimeError(f"{Path(config.output).name}: {state.step} of {config.max_steps} steps, {state.losses}")


def start_model(recipe: SpriteRecipe, model: Path) -> None:
    """Writes the networks that the training begins with, unless they are there."""
    if model.is_dir():
        return
    networks = starting_networks(recipe)
    with atomic_folder(model) as folder:
        ImageConductorPipeline(**networks.parts, sampling_defaults=defaults(recipe)).save_pretrained(folder)


def defaults(recipe: SpriteRecipe) -> dict[str, Any]:
    """Sampling defaults of the finished model."""
    width, height = recipe.world.size
    return {"width": width, "height": height, "num_frames": recipe.world.num_frames, **recipe.sampling}


def starting_networks(recipe: SpriteRecipe) -> Networks:
    """Random weights, or those of the folder that the recipe goes on from."""
    if recipe.start is None:
        return build_small_model(recipe.model, vocabulary(recipe), recipe.seed)
    networks = Networks.load(recipe.start)
    if recipe.model.attention_at_full_resolution and networks.unet.config["down_block_types"][0] == "DownBlockMotion":
        add_full_resolution_attention(networks, recipe.seed)
    if networks.motion_controlnet.flow_convention != FlowMapConvention(**cast(Any, recipe.model.flow_map)):
        networks.motion_controlnet = new_motion_controlnet(recipe, networks)
    given, wanted = networks.scheduler.config["prediction_type"], recipe.model.prediction_type
    if (given, wanted) == ("sample", "v_prediction"):
        predict_v(networks)
    elif given != wanted:
        raise ValueError(f"start={recipe.start} predicts {given!r}; it cannot go on as one of {wanted!r}")
    return networks


def vocabulary(recipe: SpriteRecipe) -> list[str]:
    """Captions that hold every word of the world."""
    return [*captions(recipe.world, 200), " ".join(caption_words()) + " ,"]


def train_vae(
    recipe: SpriteRecipe, config: AutoencoderConfig, budget: float, runs: Path, model: Path, clock: Clock
) -> None:
    """Trains the autoencoder, or its decoder, unless the result is there; processes share the crops of a step.

    Raises:
        OutOfTimeError: The time was over before its end.
    """
    done = runs / "done"
    if done.exists():
        return
    clips, processes = config.batch_size // config.frames_per_clip, PartialState().num_processes
    if clips % processes:
        raise SystemExit(f"{runs.name}: {processes} processes cannot share the crops of {clips} clips a step evenly")
    config = replace(config, max_steps=scale_steps(config.max_steps, budget), max_minutes=clock.left())
    vae = Networks.load(model).vae
    data = Batches(SpriteSamples(recipe.world, list(SpriteSet), config.frames_per_clip), clips // processes)
    workers = min(recipe.gpu.num_workers, os.cpu_count() or 1) if has_gpu() else 0
    if train_autoencoder(vae, data, config, runs, workers) < config.max_steps:
        raise OutOfTimeError(runs.name)

    def keep() -> None:
        report_decoded(recipe, vae, runs)
        vae.save_pretrained(model / "vae")
        done.touch()

    alone(keep)


@torch.no_grad()
def report_decoded(recipe: SpriteRecipe, vae: Any, output: Path) -> None:
    """Prints the PSNR of 24 decoded held-out frames, and writes some of them below the originals."""
    samples = SpriteSamples(held_out(recipe), list(SpriteSet), num_frames=1)
    frames = scale_pixels(torch.cat([samples[i]["pixel_values"].transpose(0, 1) for i in range(24)]))
    decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in frames.to(vae.device).split(4)])
    true, shown = (((x.cpu().permute(0, 2, 3, 1) + 1) / 2).clamp(0, 1).numpy() for x in (frames, decoded))
    sheet = np.concatenate([np.concatenate(list(row[:8]), axis=1) for row in (true, shown)])
    with atomic_path(output / "decoded.png") as temporary:
        Image.fromarray((sheet * 255).round().astype(np.uint8)).save(temporary)
    print(
        f"{output.name}: {np.mean([psnr(*pair) for pair in zip(shown, true, strict=True)]):.2f} dB on held-out frames"
    )


def held_out(recipe: SpriteRecipe) -> SpriteWorldConfig:
    """Clips of the recipe's world that nothing is trained on."""
    return replace(recipe.world, seed=recipe.world.seed + HELD_OUT_SEED)


def train_foundation(recipe: SpriteRecipe, budget: float, runs: Path, model: Path, clock: Clock) -> None:
    """Trains UNet, image ControlNet and text encoder, and starts the motion ControlNet from that UNet.

    Raises:
        OutOfTimeError: The time was over before its end; the model has what the phase has learned so far.
    """
    for path in recipe.foundation:
        config = stage_config(path, recipe, budget, runs, model)
        output = Path(config.output)
        if (output / "done").exists():
            continue
        try:
            train_part(config, clock)
        except OutOfTimeError:
            alone(partial(take_over, recipe, model, output))
            raise
        alone(partial(take_over, recipe, model, output))
        alone((output / "done").touch)


def take_over(recipe: SpriteRecipe, model: Path, output: Path) -> None:
    """Puts what a phase has learned into the model, and prints and writes how well that carries content."""
    for part in ("unet", "image_controlnet", "text_encoder", "motion_controlnet"):
        if (output / part).is_dir():
            shutil.copytree(output / part, model / part, dirs_exist_ok=True)
    if not (output / "motion_controlnet").is_dir():  # A phase that trains it goes on from its own.
        new_motion_controlnet(recipe, Networks.load(model)).save_pretrained(model / "motion_controlnet")
    report_errors(recipe, model, output)


def report_errors(recipe: SpriteRecipe, model: Path, output: Path) -> None:
    """Prints how well the model carries content so far, and writes it into the phase's folder."""
    table = format_errors(measure_one_step_errors(Networks.load(model), held_out(recipe)))
    write_text(output / "one_step_errors.md", table)
    print(f"{output.name}: error of x_0 predicted from pure noise, 16 held-out clips\n\n{table}")


def new_motion_controlnet(recipe: SpriteRecipe, networks: Networks) -> MotionControlNet:
    """A motion ControlNet that starts from the UNet, as ControlNets do."""
    return MotionControlNet.from_unet(networks.unet, networks.vae_scale_factor, flow_map=dict(recipe.model.flow_map))


def stage_config(path: str, recipe: SpriteRecipe, budget: float, runs: Path, model: Path) -> TrainConfig:
    """A stage's own YAML, with this recipe's folders, world and budget."""
    config, processes = load_config(Path(path)), PartialState().num_processes
    assert isinstance(config, TrainConfig), f"{path} is for stage {config.stage}"
    gpu = recipe.gpu if has_gpu() else GpuSettings(batch_factor=1, num_workers=0)
    steps, clips = scale_steps(config.max_steps, budget), config.batch_size * gpu.batch_factor
    if clips % processes:
        raise SystemExit(f"{path}: {processes} processes cannot share {clips} clips a step evenly")
    return replace(
        config,
        batch_size=clips // processes,
        num_workers=min(gpu.num_workers, os.cpu_count() or 1),
        model=str(model),
        output=str(runs / Path(path).stem),
        world=replace(recipe.world, style=config.world.style),
        max_steps=steps,
        warmup_steps=min(config.warmup_steps, steps // 4),
    )


def scale_steps(steps: int, budget: float) -> int:
    """Steps under a budget, at least two."""
    return max(2, round(steps * budget))


def finish(recipe: SpriteRecipe, runs: Path, model: Path, made: dict[str, Path]) -> None:
    """Puts the parts together as a model folder in fp16, which replaces an older one when it is complete."""
    parts: dict[str, Any] = {name: str(folder) for name, folder in made.items()}
    assembly = assemble(AssemblyConfig(recipe="trained", model=str(model), sampling=recipe.sampling, **parts))
    before = sorted((Path(recipe.start) / "training").glob("*.yaml")) if recipe.start is not None else []
    configs = [runs / Path(path).stem / "config.yaml" for path in [*recipe.foundation, *recipe.stages]]
    provenance = {f"training/{path.name}": path.read_text() for path in before}
    provenance |= {f"training/{path.parent.name}.yaml": describe_part(path) for path in configs}
    assembly.provenance = provenance
    output = Path(recipe.output)
    write_model_folder(assembly, output, replace=True)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output} ({size / 1e6:.1f} MB)")


def describe_part(path: Path) -> str:
    """The configuration of a part as one process would take it: `batch_size` is all clips of a step."""
    settings = read_yaml(path)
    settings["batch_size"] *= PartialState().num_processes
    return OmegaConf.to_yaml(OmegaConf.create(settings))


if __name__ == "__main__":
    main()
