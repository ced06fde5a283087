"""Trains variants of stages 1-3 under equal budgets and several seeds, and puts what they measure in one table.

Stages that variants share are trained once. Everything is resumable; run the same command again after an interruption.
Writes models/VARIANT-SEED, an evaluation with a row each, and ablations.md with mean and range over the seeds.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from imageconductor import config as config_file
from imageconductor.evaluation.evaluate_config import Arm, EvaluateConfig, Row
from imageconductor.evaluation.video_files import write_text
from imageconductor.training.train_config import StageName, TrainConfig

_METRICS = {"camera": ("error", "coverage"), "object": ("error", "leak", "coverage")}  # of an arm, by what it is asked


@dataclass(frozen=True)
class Variant:
    """What one variant does differently."""

    settings: list[str] = field(default_factory=list)  # STAGE.key=value, after those of all variants
    skip: list[str] = field(default_factory=list)  # stages that it goes without


@dataclass
class AblationConfig:
    """Which variants are trained from what, and how they are measured."""

    variants: dict[str, Variant]
    stages: dict[str, str]  # YAML by name, in order; a name begins with its stage's
    model: str = "models/sprites"  # folder that gives all that is not trained
    fresh_motion_controlnet: bool = False  # start from a copy of the UNet, not from the model's motion ControlNet
    settings: list[str] = field(default_factory=list)  # STAGE.key=value for all variants
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    output: str = "runs/ablations"
    evaluation: str = "configs/evaluate/sprites.yaml"
    arms: list[str] = field(default_factory=list)  # of its arms, which are measured; none = all
    evaluation_settings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.variants or not self.seeds:
            raise ValueError("ablations need at least one variant and one seed")
        for name, variant in self.variants.items():
            for text in (*variant.skip, *(text.partition(".")[0] for text in (*self.settings, *variant.settings))):
                if text not in self.stages:
                    raise ValueError(f"variant {name}: there is no stage {text!r}; there are {', '.join(self.stages)}")
        for name in self.stages:
            stage_of(name)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 2 = bad input, told in one line."""
    config, _ = config_file.command_line(AblationConfig, __doc__ or "", argv)
    output = Path(config.output)
    try:
        plans = {
            f"{name}-{seed}": stage_configs(config, variant, seed)
            for seed in config.seeds
            for name, variant in config.variants.items()
        }
        evaluation = measured(config)
        fresh = fresh_motion_controlnet(config) if config.fresh_motion_controlnet else None
        rows = {}
        for name, plan in plans.items():
            rows[name] = Row(model=str(trained_model(config, name, plan, fresh)))
        record = evaluated(replace(evaluation, model=None, rows=rows), output / "evaluation")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = format_table(config, evaluation.arms, record)
    write_text(output / "ablations.md", table)
    print(table)
    return 0


def stage_of(name: str) -> StageName:
    """The stage that a name begins with.

    Raises:
        ValueError: It begins with none.
    """
    for stage in StageName:
        if name.startswith(stage.value) and stage not in (StageName.FOUNDATION, StageName.STYLE_LORA):
            return stage
    raise ValueError(f"stage {name!r} begins with none of motion_controlnet, camera_lora, object_lora")


def stage_configs(config: AblationConfig, variant: Variant, seed: int) -> dict[str, TrainConfig]:
    """Settings of a variant's stages; the output folder is named after all that it depends on."""
    digest = hashlib.sha256(f"{config.model} {config.fresh_motion_controlnet}".encode())
    plan = {}
    for name, path in config.stages.items():
        if name in variant.skip:
            continue
        given = [text.partition(".") for text in (*config.settings, *variant.settings)]
        overrides = [setting for stage, _, setting in given if stage == name]
        base = config_file.load(TrainConfig, Path(path), [*overrides, f"seed={seed}"])
        # What a stage starts from is set when that is known.
        base = replace(base, model=config.model, motion_controlnet=None, camera_lora=None, output="")
        base = replace(base, warmup_steps=min(base.warmup_steps, base.max_steps // 4))
        digest.update(json.dumps([name, asdict(base)], default=str).encode())
        plan[name] = replace(base, output=str(Path(config.output) / "stages" / f"{name}-{digest.hexdigest()[:12]}"))
    return plan


def measured(config: AblationConfig) -> EvaluateConfig:
    """The evaluation, with those of its arms that are asked for.

    Raises:
        ValueError: It has no such arm.
    """
    evaluation = config_file.load(EvaluateConfig, Path(config.evaluation), config.evaluation_settings)
    if unknown := sorted(set(config.arms) - set(evaluation.arms)):
        raise ValueError(f"{config.evaluation} has no arm {', '.join(unknown)}; it has {', '.join(evaluation.arms)}")
    arms = {name: arm for name, arm in evaluation.arms.items() if name in config.arms or not config.arms}
    return replace(evaluation, arms=arms)


def fresh_motion_controlnet(config: AblationConfig) -> str:
    """Folder of a motion ControlNet that is a copy of the model's UNet, as ControlNets start."""
    from imageconductor.models.controlnets import MotionControlNet
    from imageconductor.models.networks import Networks

    folder = Path(config.output) / "fresh_motion_controlnet"
    if not (folder / "config.json").exists():
        networks = Networks.load(config.model)
        convention = asdict(networks.motion_controlnet.flow_convention)
        network = MotionControlNet.from_unet(networks.unet, networks.vae_scale_factor, flow_map=convention)
        network.save_pretrained(folder)
    return str(folder)


def trained_model(config: AblationConfig, name: str, plan: Mapping[str, TrainConfig], fresh: str | None) -> Path:
    """Trains what is missing of a variant and puts it together as a model folder."""
    from imageconductor.checkpoints.assembly import AssemblyConfig, assemble
    from imageconductor.sampling.pipeline import ImageConductorPipeline
    from imageconductor.training.run import run_stage

    made: dict[str, str | None] = {"motion_controlnet": fresh, "camera_lora": None, "object_lora": None}
    for stage_name, settings in plan.items():
        stage = stage_of(stage_name)
        settings = replace(settings, motion_controlnet=made["motion_controlnet"])
        if stage == StageName.OBJECT_LORA:
            settings = replace(settings, camera_lora=made["camera_lora"])
        result = Path(settings.output) / stage.value
        if not (Path(settings.output) / "done").exists():
            print(f"{name}: {settings.output}")
            run_stage(stage, settings)
            (Path(settings.output) / "done").touch()
        made[stage.value] = str(result)
    folder = Path(config.output) / "models" / name
    if not folder.exists():
        parts = assemble(
            AssemblyConfig(
                recipe="trained",
                model=config.model,
                motion_controlnet=made["motion_controlnet"],
                camera_lora=made["camera_lora"],
                object_lora=made["object_lora"],
            )
        )
        pipe = ImageConductorPipeline(**vars(parts.networks), sampling_defaults=parts.sampling)
        temporary = folder.with_name(f".{folder.name}.new")
        pipe.save_pretrained(temporary / folder.name)
        (temporary / folder.name).rename(folder)
        temporary.rmdir()
    return folder


def evaluated(config: EvaluateConfig, output: Path) -> dict[str, Any]:
    """The figures of all models."""
    from imageconductor.evaluation.protocol import Evaluation
    from imageconductor.evaluation.report import write_report

    evaluation = Evaluation(config, output)
    record = evaluation.run()
    if record is None:
        raise ValueError("ablations run in one process; the stages and evaluate.py take several")
    write_report(evaluation, record, output)
    return record


def format_table(config: AblationConfig, arms: Mapping[str, Arm], record: dict[str, Any]) -> str:
    """Markdown: a row a variant; mean over the seeds and, in brackets, the lowest and highest of them."""
    columns = [(name, metric) for name, arm in arms.items() for metric in _METRICS[arm.requests]]
    titles = [f"{arm.replace('_', ' ')}: {metric}" for arm, metric in columns]
    lines = ["| variant | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in config.variants:
        cells = []
        for arm, metric in columns:
            found = [record["rows"][f"{name}-{seed}"]["arms"][arm][metric]["mean"] for seed in config.seeds]
            values = [value for value in found if value is not None]
            cells.append(f"{np.mean(values):.2f} ({min(values):.2f} .. {max(values):.2f})" if values else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seeds = ", ".join(map(str, config.seeds))
    return "\n".join(lines) + f"\n\nErrors and leaks in pixels of the videos; mean and range over seeds {seeds}.\n"


if __name__ == "__main__":
    sys.exit(main())
