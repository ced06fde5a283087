"""The files of scores, one for each video, each kept until the video or what measures it changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imageconductor.evaluation.scores import to_json_values
from imageconductor.files import write_text


def identify_file(path: Path) -> list[Any]:
    """Path, size and date of a file, in types of JSON."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def is_scored(target: Path, expected: Mapping[str, Any], is_complete: bool = True) -> bool:
    """Whether there is a score of this video, by these instruments.

    Args:
        target: File of the score.
        expected: What it must have been measured with; the score may know of more.
        is_complete: Whether no instrument may have failed.
    """
    if not target.exists():
        return False
    old = json.loads(target.read_text())
    known = old.get("measured_with", {})
    return all(known.get(key) == value for key, value in expected.items()) and not (is_complete and "failed" in old)


def write_score(target: Path, key: str, score: Mapping[str, Any], measured_with: Mapping[str, Any]) -> None:
    """Writes the metrics of a video; NaN becomes null."""
    values = to_json_values(score)
    write_text(target, json.dumps({"key": key, **values, "measured_with": measured_with}))
