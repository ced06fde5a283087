"""Trains variants of stages 1-3 under equal budgets and several seeds, and puts their metrics in one table.

Stages that variants share are trained once. Run the same command again after an interruption: it continues where it
stopped. Writes models/VARIANT-SEED, an evaluation of these models, and ablations.md with mean and range over the seeds.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from imageconductor import config as config_file
from imageconductor.command_line import parse_command_line
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig, Method, Task
from imageconductor.files import atomic_folder, check_record, check_writable, write_record, write_text
from imageconductor.training.train_config import TrainConfig

_STAGES = ("motion_controlnet", "camera_lora", "object_lora")
_METRICS = {  # columns of the table, by a task's set of requests
    "camera": ("error", "tracked_fraction"),
    "object": ("error", "background_displacement", "tracked_fraction"),
}


@dataclass(frozen=True)
class Variant:
    """Settings by which one variant differs from the others."""

    settings: list[str] = field(default_factory=list)  # STAGE.key=value, applied after the settings of all variants
    skip: list[str] = field(default_factory=list)  # stages that are not trained


@dataclass
class AblationConfig:
    """Variants, the stages that are trained for each, and their evaluation."""

    RENAMED: ClassVar[dict[str, str]] = {"arms": "tasks"}

    variants: dict[str, Variant]  # variants by name, each {settings: [STAGE.key=value], skip: [STAGE]}
    stages: dict[str, str]  # YAML file of each stage to train, by a name of your choice, in order
    model: str = "models/sprites"  # model folder that gives the networks which no stage trains
    # Start from a copy of the UNet instead of the model's motion ControlNet.
    fresh_motion_controlnet: bool = False
    settings: list[str] = field(default_factory=list)  # STAGE.key=value for all variants
    seeds: list[int] = field(default_factory=lambda: [0, 1])  # every variant is trained once with each seed
    output: str = "runs/ablations"  # folder for stages, models, the evaluation and the table
    evaluation: str = "configs/evaluate/sprites.yaml"  # YAML file of the evaluation
    tasks: list[str] = field(default_factory=list)  # tasks of the evaluation to measure; none given = all of them
    evaluation_settings: list[str] = field(default_factory=list)  # key=value for the evaluation

    def __post_init__(self) -> None:
        if not self.variants or not self.seeds:
            raise ValueError("ablations need at least one variant and one seed")
        for name, variant in self.variants.items():
            for text in (*variant.skip, *(text.partition(".")[0] for text in (*self.settings, *variant.settings))):
                if text not in self.stages:
                    raise ValueError(f"variant {name}: there is no stage {text!r}; there are {', '.join(self.stages)}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 2 after one line about bad input, else 0."""
    config, _ = parse_command_line(AblationConfig, __doc__ or "", argv)
    output = Path(config.output)
    try:
        check_writable(output)
        plans = {
            f"{name}-{seed}": build_stage_configs(config, variant, seed)
            for seed in config.seeds
            for name, variant in config.variants.items()
        }
        evaluation = load_evaluation(config)
        fresh = make_motion_controlnet(config) if config.fresh_motion_controlnet else None
        methods = {}
        for name, plan in plans.items():
            methods[name] = Method(model=str(train_model(config, name, plan, fresh)))
        record = evaluate_models(replace(evaluation, model=None, methods=methods), output / "evaluation")
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = format_table(config, evaluation.tasks, record)
    write_text(output / "ablations.md", table)
    print(table)
    return 0


def build_stage_configs(config: AblationConfig, variant: Variant, seed: int) -> dict[str, TrainConfig]:
    """Settings of a variant's stages; each output folder is named after all that its weights depend on.

    Raises:
        ValueError: A YAML file is not of one of the paper's three stages, or a setting is wrong.
    """
    from imageconductor.training.stage_configs import load_config

    digest = hashlib.sha256(f"{config.model} {config.fresh_motion_controlnet}".encode())
    plan = {}
    for name, path in config.stages.items():
        if name in variant.skip:
            continue
        given = [text.partition(".") for text in (*config.settings, *variant.settings)]
        overrides = [text for stage, _, text in given if stage == name]
        settings = load_config(Path(path), [*overrides, f"seed={seed}"])
        if settings.stage not in _STAGES or not isinstance(settings, TrainConfig):
            raise ValueError(f"stage {name!r}: {path} is for {settings.stage}, not for one of {', '.join(_STAGES)}")
        # The weights that a stage starts from are set once they are trained.
        settings = replace(set_weights(settings, dict.fromkeys(_STAGES)), model=config.model, output="")
        settings = replace(settings, warmup_steps=min(settings.warmup_steps, settings.max_steps // 4))
        digest.update(json.dumps([name, asdict(settings)], default=str).encode())
        plan[name] = replace(settings, output=str(Path(config.output) / "stages" / f"{name}-{digest.hexdigest()[:12]}"))
    return plan


def set_weights(settings: TrainConfig, weights: Mapping[str, str | None]) -> TrainConfig:
    """Settings of a stage with the weights that it starts from.

    Args:
        settings: Settings of the stage.
        weights: Folders by name; null = the model's own. Names that the stage has no setting for are ignored.
    """
    names = weights.keys() & {field.name for field in fields(settings)}
    return replace(settings, **{name: weights[name] for name in names})


def load_evaluation(config: AblationConfig) -> EvaluateConfig:
    """Settings of the evaluation, with the tasks that are to be measured.

    Raises:
        ValueError: The evaluation has no such task.
    """
    evaluation = config_file.load(EvaluateConfig, Path(config.evaluation), config.evaluation_settings)
    if unknown := sorted(set(config.tasks) - set(evaluation.tasks)):
        raise ValueError(f"{config.evaluation} has no task {', '.join(unknown)}; it has {', '.join(evaluation.tasks)}")
    tasks = {name: task for name, task in evaluation.tasks.items() if name in config.tasks or not config.tasks}
    return replace(evaluation, tasks=tasks)


def make_motion_controlnet(config: AblationConfig) -> str:
    """Folder of a motion ControlNet before training: a copy of the model's UNet with zero-initialised outputs."""
    from imageconductor.models.controlnets import MotionControlNet
    from imageconductor.models.networks import Networks

    folder = Path(config.output) / "fresh_motion_controlnet"
    record, made_with = folder.with_name("fresh_motion_controlnet.json"), {"model": config.model}
    check_record(record, made_with, folder)
    if not (folder / "config.json").exists():
        write_record(record, made_with)
        networks = Networks.load(config.model)
        convention = asdict(networks.motion_controlnet.flow_convention)
        network = MotionControlNet.from_unet(networks.unet, networks.vae_scale_factor, flow_map=convention)
        with atomic_folder(folder, replace=True) as temporary:
            network.save_pretrained(temporary)
    return str(folder)


def train_model(config: AblationConfig, name: str, plan: Mapping[str, TrainConfig], fresh: str | None) -> Path:
    """Folder of a variant's model; trains the stages that are missing."""
    from imageconductor.checkpoints.assembly import AssemblyConfig, assemble
    from imageconductor.commands.assemble import write_model_folder
    from imageconductor.training.run import run_stage

    weights: dict[str, Any] = {**dict.fromkeys(_STAGES), "motion_controlnet": fresh}
    model = Path(config.output) / "models" / name
    record, made_with = model.with_name(f"{name}.json"), {"model": config.model, "fresh": fresh is not None}
    made_with["stages"] = [Path(settings.output).name for settings in plan.values()]
    check_record(record, made_with, model)
    for settings in plan.values():
        folder = Path(settings.output)
        if not (folder / "done").exists():
            print(f"{name}: {folder}")
            state = run_stage(set_weights(settings, weights))
            if state.step < settings.max_steps:
                raise ValueError(
                    f"{folder} stopped at step {state.step} of {settings.max_steps}: leave max_minutes out"
                )
            (folder / "done").touch()
        weights[settings.stage] = str(folder / settings.stage)
    if not model.exists():
        write_record(record, made_with)
        write_model_folder(assemble(AssemblyConfig(recipe="trained", model=config.model, **weights)), model)
    return model


def evaluate_models(config: EvaluateConfig, output: Path) -> dict[str, Any]:
    """Evaluates all models and writes the report; returns the record of results.json."""
    from imageconductor.evaluation.drawn_motion.protocol import Evaluation
    from imageconductor.evaluation.drawn_motion.report import write_report

    evaluation = Evaluation(config, output)
    record = evaluation.run()
    if record is None:
        raise ValueError("ablations run in one process; the stages and evaluate.py take several")
    write_report(evaluation, record, output)
    return record


def format_table(config: AblationConfig, tasks: Mapping[str, Task], record: dict[str, Any]) -> str:
    """Markdown table, one line for each variant: mean over the seeds, lowest and highest of them in brackets."""
    columns = [(name, metric) for name, task in tasks.items() for metric in _METRICS[task.requests]]
    titles = [f"{task}: {metric}".replace("_", " ") for task, metric in columns]
    lines = ["| variant | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in config.variants:
        cells = []
        for task, metric in columns:
            models = [record["methods"][f"{name}-{seed}"] for seed in config.seeds]
            means = [model["tasks"][task].get(metric, {}).get("mean") for model in models]
            values = [mean for mean in means if mean is not None]
            cells.append(f"{np.mean(values):.2f} ({min(values):.2f} .. {max(values):.2f})" if values else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seeds = ", ".join(map(str, config.seeds))
    note = f"Errors and background displacement in pixels of the videos; mean and range over seeds {seeds}."
    return "\n".join(lines) + f"\n\n{note}\n"


if __name__ == "__main__":
    sys.exit(main())
