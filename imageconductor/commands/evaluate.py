"""Measures how well videos follow what was drawn or boxes, or how well they repeat a motion that was learned.

Drawn motion: the paper's Table 1, its figures, and the sprite world's own scenes. Learned motion: MotionDirector's
prompts x motions by several methods, for YAML files that say `protocol: learned_motion`. Boxes: SMCD's overlaps of
tracked objects on GOT-10k, YouTube-VIS or sprites, `protocol: boxes`. `--config FILE --help` lists the settings of a
file's protocol.

Makes the videos that are missing, scores them, and writes results.json, table.md and contact sheets; of drawn motion
also table.tex, and report.html with the worst videos first. Run it again after an interruption, or with one more
method, task or motion: finished videos and scores are kept. Exit code 1: something could not be measured; the reason is
printed, and all else is written.
`accelerate launch -m imageconductor evaluate ...` spreads the work over GPUs. docs/reproduce.md has the commands.

`imageconductor evaluate export-requests ...` takes the settings of drawn motion and only writes what other programs
need to make their videos, in the frame of each method: first frames, trajectories, prompts and seeds.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from imageconductor import config as config_file
from imageconductor.command_line import parse_command_line, peek_settings
from imageconductor.evaluation.boxes.config import BoxEvaluateConfig
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
from imageconductor.evaluation.learned_motion.config import LearnedMotionConfig

Settings = EvaluateConfig | LearnedMotionConfig | BoxEvaluateConfig

_SCHEMAS: tuple[type[Settings], ...] = (EvaluateConfig, LearnedMotionConfig, BoxEvaluateConfig)
_PROTOCOLS: dict[str, type[Settings]] = {schema.protocol: schema for schema in _SCHEMAS}


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code: 2 = bad input, 1 = something could not be measured."""
    argv = sys.argv[1:] if argv is None else argv
    if only_export := argv[:1] == ["export-requests"]:
        argv = argv[1:]
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for videos, scores and results"
    )
    try:
        schema = choose_protocol(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config, args = parse_command_line(schema, __doc__ or "", argv, parents=[extra])
    output: Path = args.output
    try:
        if only_export:
            _export(config, output)
            print(output)
            return 0
        record = _evaluate(config, output)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if record is None else _tell_failures(record)


def choose_protocol(argv: Sequence[str]) -> type[Settings]:
    """The schema of the protocol that the YAML file or `protocol=NAME` states, else that of drawn motion.

    Raises:
        ValueError: There is no such protocol, or the file cannot be read.
    """
    path, overrides = peek_settings(argv)
    named = [value for key, _, value in (text.partition("=") for text in overrides) if key == "protocol"]
    stated = None if path is None else config_file.read_yaml(path).get("protocol")
    name = str(stated if stated is not None else named[-1] if named else EvaluateConfig.protocol)
    if name not in _PROTOCOLS:
        raise ValueError(f"{path or 'the command line'}: protocol must be one of {', '.join(_PROTOCOLS)}, got {name!r}")
    return _PROTOCOLS[name]


def _evaluate(config: Settings, output: Path) -> dict[str, Any] | None:
    if isinstance(config, LearnedMotionConfig):
        return _evaluate_learned(config, output)
    return _evaluate_boxes(config, output) if isinstance(config, BoxEvaluateConfig) else _evaluate_drawn(config, output)


def _evaluate_drawn(config: EvaluateConfig, output: Path) -> dict[str, Any] | None:
    from imageconductor.evaluation.drawn_motion.protocol import Evaluation
    from imageconductor.evaluation.drawn_motion.report import format_markdown, write_report

    return _report(Evaluation(config, output), write_report, format_markdown, "report.html")


def _evaluate_learned(config: LearnedMotionConfig, output: Path) -> dict[str, Any] | None:
    from imageconductor.evaluation.learned_motion.protocol import LearnedMotionEvaluation
    from imageconductor.evaluation.learned_motion.summary import format_learned_motion, write_learned_motion_report

    evaluation = LearnedMotionEvaluation(config, output)
    return _report(evaluation, write_learned_motion_report, format_learned_motion, "table.md")


def _evaluate_boxes(config: BoxEvaluateConfig, output: Path) -> dict[str, Any] | None:
    from imageconductor.evaluation.boxes.protocol import BoxEvaluation
    from imageconductor.evaluation.boxes.summary import format_boxes, write_box_report

    return _report(BoxEvaluation(config, output), write_box_report, format_boxes, "table.md")


def _report(
    evaluation: Any, write: Callable[..., None], describe: Callable[[dict[str, Any]], str], page: str
) -> dict[str, Any] | None:
    """Runs an evaluation, and on the main process writes its report and prints its tables and where the page is."""
    record = evaluation.run()
    if record is not None:
        write(evaluation, record, evaluation.output)
        print(describe(record))
        print(evaluation.output / page)
    return record


def _export(config: Settings, output: Path) -> None:
    if not isinstance(config, EvaluateConfig):
        raise ValueError(f"export-requests is for drawn motion, and these are settings of protocol {config.protocol}")
    from imageconductor.evaluation.drawn_motion.request_files import export_requests

    export_requests(config, output)


def _tell_failures(record: dict[str, Any]) -> int:
    """Prints what could not be measured, and gives the exit code."""
    from imageconductor.evaluation.scores import list_failures

    failures = list_failures(record)
    for failure in failures:
        print(f"not measured: {failure}", file=sys.stderr)
    if failures:
        print("all else is written; the same command measures what is missing", file=sys.stderr)
    return 1 if failures else 0


def _list_elsewhere(schema: type[Settings]) -> dict[str, str]:
    """Where the settings are that other protocols have alone, but for those that are probably misspelled ones of it."""
    ours = [setting.name for setting in fields(schema)]
    found: dict[str, list[str]] = {}
    for protocol, other in _PROTOCOLS.items():
        for setting in fields(other):
            if not difflib.get_close_matches(setting.name, ours, n=1):
                found.setdefault(setting.name, []).append(protocol)
    return {name: f"a setting of protocol {' or '.join(protocols)}" for name, protocols in found.items()}


for _schema in _SCHEMAS:
    _schema.ELSEWHERE = _list_elsewhere(_schema)
