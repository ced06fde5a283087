"""Builds the bundled model from nothing: autoencoder, foundation, decoder, then stages 1-3 and a style LoRA.

Each part is resumable; run the same command again after an interruption. A finished part is not repeated.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from imageconductor.checkpoints.assembly import AssemblyConfig, assemble
from imageconductor.command_line import finite_float, parse_command_line
from imageconductor.conditioning.flow_map import FlowMapConvention
from imageconductor.data.batches import Batches, SpriteSamples, scale_pixels
from imageconductor.data.sprites import SpriteSet, SpriteWorldConfig, caption_words, captions
from imageconductor.evaluation.motion import psnr
from imageconductor.evaluation.one_step_error import format_errors, measure_one_step_errors
from imageconductor.files import atomic_folder, check_writable, write_text
from imageconductor.models.controlnets import MotionControlNet
from imageconductor.models.networks import Networks
from imageconductor.models.small_model import SmallModelConfig, add_full_resolution_attention, build_small_model
from imageconductor.sampling.pipeline import ImageConductorPipeline, write_model_folder
from imageconductor.sampling.video import contact_sheet, to_uint8
from imageconductor.training.autoencoder import AutoencoderConfig, train_autoencoder
from imageconductor.training.run import HELD_OUT_SEED, run_stage
from imageconductor.training.stages.registry import load_config
from imageconductor.training.train_config import TrainConfig


@dataclass
class SpriteRecipe:
    """Everything about the bundled model."""

    output: str = "models/sprites"  # the finished model folder, fp16
    # Model folder to go on from, its autoencoder kept, its motion ControlNet too if it reads the same flow maps;
    # attention that `model` asks for and it lacks is added. None = random weights.
    start: str | None = None
    runs: str = "runs/sprites"  # working folder: checkpoints and the float32 model
    world: SpriteWorldConfig = field(default_factory=SpriteWorldConfig)
    model: SmallModelConfig = field(default_factory=SmallModelConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    # Further steps of its decoder, which may come at any time, also after `start`; 0 steps = none.
    decoder: AutoencoderConfig = field(default_factory=lambda: AutoencoderConfig(decoder_only=True, max_steps=0))
    foundation: list[str] = field(default_factory=list)  # YAML files of the foundation's phases, in order
    stages: list[str] = field(default_factory=list)  # YAML files of stages 1-3, in order
    sampling: dict[str, Any] = field(  # sampling defaults of the finished model
        default_factory=lambda: {
            "fps": 8,
            "guidance_scale": 1.0,
            "trajectory_guidance_scale": 2.0,
            "negative_prompt": "",
            "num_inference_steps": 25,
        }
    )
    seed: int = 0


def main() -> None:
    """Parses the command and builds the model."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument(
        "--budget", type=finite_float, default=1.0, help="scales the steps of every part, e.g. 0.01 to try it"
    )
    recipe, args = parse_command_line(SpriteRecipe, __doc__ or "", parents=[extra])
    runs, model = Path(recipe.runs), Path(recipe.runs) / "model"
    try:
        for folder in (recipe.output, recipe.runs):
            check_writable(Path(folder))
    except ValueError as error:
        extra.exit(2, f"error: {error}\n")
    if model.is_dir() and not (model / "model_index.json").is_file():
        raise SystemExit(f"{model} is of an earlier version, or not whole; name other runs=FOLDER, or delete it")
    if not model.is_dir():
        networks = starting_networks(recipe)
        with atomic_folder(model) as folder:
            ImageConductorPipeline(**networks.parts, sampling_defaults=defaults(recipe)).save_pretrained(folder)
    if recipe.start is None:
        train_vae(recipe, recipe.autoencoder, args.budget, runs / "autoencoder", model)
    train_foundation(recipe, args.budget, runs, model)
    if recipe.decoder.max_steps:
        train_vae(recipe, recipe.decoder, args.budget, runs / "decoder", model)
    made = {"motion_controlnet": model / "motion_controlnet"}
    if recipe.start is not None:  # A stage that is not repeated leaves its LoRA as it was.
        adapters = (f"{name}_lora" for name in ("camera", "object", "style"))
        made |= {name: Path(recipe.start) / name for name in adapters if (Path(recipe.start) / name).is_dir()}
    for path in recipe.stages:
        config = stage_config(path, recipe, args.budget, runs, model)
        wanted = [key for key in ("motion_controlnet", "camera_lora") if hasattr(config, key) and key in made]
        inputs = {key: str(made[key]) for key in wanted}
        run_stage(replace(config, **inputs))
        made[config.stage] = Path(config.output) / config.stage
    finish(recipe, runs, model, made)


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
    return networks


def vocabulary(recipe: SpriteRecipe) -> list[str]:
    """Captions that hold every word of the world."""
    return [*captions(recipe.world, 200), " ".join(caption_words()) + " ,"]


def train_vae(recipe: SpriteRecipe, config: AutoencoderConfig, budget: float, runs: Path, model: Path) -> None:
    """Trains the autoencoder, or its decoder, unless the result is there."""
    config = replace(config, max_steps=scale_steps(config.max_steps, budget))
    done = runs / "done"
    if done.exists():
        return
    networks = Networks.load(model)
    samples = SpriteSamples(recipe.world, list(SpriteSet), config.frames_per_clip)
    data = Batches(samples, config.batch_size // config.frames_per_clip)
    train_autoencoder(networks.vae, data, config, runs)
    report_decoded(recipe, networks.vae, runs)
    networks.vae.save_pretrained(model / "vae")
    done.touch()


@torch.no_grad()
def report_decoded(recipe: SpriteRecipe, vae: Any, output: Path) -> None:
    """Prints the PSNR of 24 decoded held-out frames, and writes some of them beside the originals."""
    samples = SpriteSamples(held_out(recipe), list(SpriteSet), num_frames=1)
    frames = scale_pixels(torch.cat([samples[i]["pixel_values"].transpose(0, 1) for i in range(24)]))
    decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in frames.to(vae.device).split(4)])
    true, shown = (((x.cpu().permute(0, 2, 3, 1) + 1) / 2).clamp(0, 1).numpy() for x in (frames, decoded))
    rows = [("original", to_uint8(true)), ("decoded", to_uint8(shown))]
    contact_sheet(output / "decoded.png", rows, columns=12)
    print(
        f"{output.name}: {np.mean([psnr(*pair) for pair in zip(shown, true, strict=True)]):.2f} dB on held-out frames"
    )


def held_out(recipe: SpriteRecipe) -> SpriteWorldConfig:
    """Clips of the recipe's world that nothing is trained on."""
    return replace(recipe.world, seed=recipe.world.seed + HELD_OUT_SEED)


def train_foundation(recipe: SpriteRecipe, budget: float, runs: Path, model: Path) -> None:
    """Trains UNet, image ControlNet and text encoder, and starts the motion ControlNet from that UNet."""
    done = runs / "foundation.done"
    if done.exists():
        return
    for path in recipe.foundation:
        config = stage_config(path, recipe, budget, runs, model)
        if (finished := Path(config.output) / "done").exists():
            continue
        run_stage(config)
        for part in ("unet", "image_controlnet", "text_encoder", "motion_controlnet"):
            if (Path(config.output) / part).is_dir():
                shutil.copytree(Path(config.output) / part, model / part, dirs_exist_ok=True)
        if not (Path(config.output) / "motion_controlnet").is_dir():  # A phase that trains it goes on from its own.
            new_motion_controlnet(recipe, Networks.load(model)).save_pretrained(model / "motion_controlnet")
        report_errors(recipe, model, Path(config.output))
        finished.touch()
    done.touch()


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
    config = load_config(Path(path))
    steps = scale_steps(config.max_steps, budget)
    return replace(
        config,
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
    provenance |= {f"training/{path.parent.name}.yaml": path.read_text() for path in configs}
    assembly.provenance = provenance
    output = Path(recipe.output)
    write_model_folder(assembly, output, replace=True)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
