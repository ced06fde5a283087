"""How LoRAs are named in a job: FILE or FILE:SCALE, or the folder of a `motion_director` run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from imageconductor import config as config_file
from imageconductor.files import find_shipped

if TYPE_CHECKING:
    from imageconductor.sampling.job import SampleJob

_NOISE_FRACTION = 0.3  # MotionDirector: 0.1 to 0.5 for a motion from one clip


def parse_lora(text: str, default: float = 1.0) -> tuple[str, float]:
    """File and scale of `FILE[:scale]`; the scale is `default` when it is not given.

    Raises:
        ValueError: What stands after the colon of a file that does not exist as written is no finite number.
    """
    if (whole := find_shipped(text)).exists():
        return str(whole), default
    path, colon, scale = text.rpartition(":")
    if not colon:
        return text, default
    try:
        number = float(scale)
    except ValueError:
        raise ValueError(f"{text!r}: expected FILE or FILE:scale, and {scale!r} is no number") from None
    config_file.check_finite(number, f"{text!r}: the scale")
    return str(find_shipped(path)), number


def find_lora(text: str, kind: Literal["style", "motion", "appearance"]) -> tuple[str, float]:
    """File and scale of a LoRA as `parse_lora`; a run of `motion_director` stands for its LoRA of that kind.

    Raises:
        FileNotFoundError: There is nothing at this path, or the run has no such LoRA.
        ValueError: As `parse_lora`, or the run has one for each of its clips.
    """
    from imageconductor.checkpoints.reference_run import find_reference_lora

    path, scale = parse_lora(text)
    if kind != "style":
        return str(find_reference_lora(Path(path), kind)), scale
    if not Path(path).exists():  # a folder of peft's is one too
        raise FileNotFoundError(f"no file at {path}")
    return path, scale


def find_job_loras(job: SampleJob) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Files and scales of a job's LoRAs of any of the UNet's layers, and of those of the motion modules.

    They are those that it names, and those of its model that go with few steps and with the scene gates.

    Raises:
        FileNotFoundError, ValueError: As `find_lora`.
    """
    from imageconductor.checkpoints.few_step import find_few_step_lora
    from imageconductor.checkpoints.model_folder import find_scene_lora

    styles = [find_lora(text, "style") for text in job.lora]
    styles += [find_lora(text, "appearance") for text in job.appearance_lora]
    motions = [find_lora(text, "motion") for text in job.motion_lora]
    if job.few_step and (path := find_few_step_lora(job.model)):
        styles.append((str(path), 1.0))
    if job.first_frame_by in ("gates", "both") and (path := find_scene_lora(job.model)):
        motions.append((str(path), 1.0))
    return styles, motions


def takes_few_steps(model: str, asked: bool | None, steps: int) -> bool:
    """Whether a job is made with its model's few-step LoRA.

    Args:
        model: Its folder.
        asked: In the job; None = where the model has one and the steps are few.
        steps: Of the job, or the model's default.

    Raises:
        FileNotFoundError: It is asked for, and the model has none.
    """
    from imageconductor.checkpoints.few_step import FEW_STEP_FOLDER, MOST_STEPS, find_few_step_lora

    has_lora = find_few_step_lora(model) is not None
    if asked and not has_lora:
        raise FileNotFoundError(f"{model} has no few-step LoRA ({FEW_STEP_FOLDER}/), so leave few_step out")
    return has_lora and steps <= MOST_STEPS if asked is None else asked


def absolute_lora(text: str) -> str:
    """FILE or FILE:SCALE with the file's whole path, wherever it was found.

    Links stay: those of the hub's cache lead to files whose names do not tell their format.
    """
    path, scale = parse_lora(text)
    return f"{Path(path).absolute()}:{_all_digits(scale)}" if scale != 1 else str(Path(path).absolute())


def parse_noise_prior(text: str) -> tuple[Path, float]:
    """Run folder and fraction of `RUN[:p]`; a fraction that is not given is the run's own, or 0.3.

    Raises:
        ValueError: The fraction is none.
    """
    run, fraction = parse_lora(text, math.inf)
    if fraction == math.inf:
        settings = Path(run, "config.yaml")
        fraction = config_file.read_yaml(settings).get("noise_prior") if settings.is_file() else None
        fraction = fraction or _NOISE_FRACTION
    if not 0 <= fraction <= 1:
        raise ValueError(f"noise_prior {text}: the fraction must lie in [0, 1], got {fraction}")
    return Path(run), fraction


def absolute_noise_prior(text: str) -> str:
    """RUN:p with the run's whole path."""
    run, fraction = parse_noise_prior(text)
    return f"{run.absolute()}:{_all_digits(fraction)}"


def _all_digits(number: float) -> str:
    """A number as it is read back to the last bit."""
    return repr(float(number)).removesuffix(".0")
