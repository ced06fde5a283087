"""The settings that a method's videos depend on, so that videos made with others are never taken for them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from imageconductor.checkpoints.few_step import FEW_STEP_FOLDER, find_few_step_lora
from imageconductor.evaluation.score_files import identify_file
from imageconductor.sampling.job import SampleJob

TASK = "task "
MOTION = "motion "
"""Beginnings of the names of a record's parts that may be added later."""


def locate_record(output: Path, name: str) -> Path:
    """File of what the videos of a method were made with, in the folder of an evaluation."""
    return output / "videos" / name / "made_with.json"


def merge_with_record(
    record: Path, settings: dict[str, Any], unknown: Collection[str] = (), idle: Collection[str] = ()
) -> dict[str, Any]:
    """The settings that the record keeps together with these; a task or a motion may be added later.

    Args:
        record: From `locate_record`; there need not be a file yet.
        settings: Of the protocol, in types of JSON.
        unknown: Settings that may be anything where the record says null.
        idle: Settings that may be anything, as nothing is made of them.

    Raises:
        ValueError: The videos were made with other settings; names the first one, and both values.
    """
    old: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    compared = {
        key for key in (*old, *settings) if not key.startswith((TASK, MOTION)) or (key in old and key in settings)
    } - {key for key in unknown if old.get(key) is None}
    if old and (changed := sorted(key for key in compared.difference(idle) if old.get(key) != settings.get(key))):
        more = f", and {', '.join(changed[1:])}" if len(changed) > 1 else ""
        told = _describe_change(changed[0], old.get(changed[0]), settings.get(changed[0]))
        raise ValueError(f"{record.parent} was made with other settings: {told}{more}; name another --output")
    return {**old, **settings}


def _describe_change(name: str, old: Any, new: Any) -> str:
    """Both values of a setting, or of the first thing that differs inside it."""
    if isinstance(old, dict) and isinstance(new, dict):
        inner = next((key for key in {**old, **new} if old.get(key) != new.get(key)), None)
        if inner is not None:
            return _describe_change(f"{name}.{inner}", old.get(inner), new.get(inner))
    return f"{name} was {str(old)[:80]} and now {str(new)[:80]}"


def describe_few_steps(job: SampleJob) -> dict[str, bool]:
    """Whether the model's few-step LoRA acts, where it has one."""
    return {} if find_few_step_lora(job.model) is None else {"few_step": bool(job.few_step)}


def describe_files(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size and date of files by their paths."""
    return {str(path): identify_file(path)[1:] for path in sorted(paths)}


def list_weights(folder: Path) -> list[Path]:
    """Weight files of a model; not the style LoRA beside it, which acts only if a method names it."""
    unused = "style_lora", FEW_STEP_FOLDER
    return [path for path in folder.rglob("*.safetensors") if path.relative_to(folder).parts[0] not in unused]
