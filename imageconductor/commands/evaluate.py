"""Measures how well videos follow what was drawn: the paper's Table 1, its figures, and the sprite world's own scenes.

Makes the videos that are missing, scores them, and writes results.json, table.md, table.tex, report.html with the worst
videos first, and contact sheets. Run it again after an interruption, or with one more method or task: finished videos
and scores are kept. Exit code 1: something could not be measured; the reason is printed, and all else is written.
`accelerate launch -m imageconductor evaluate ...` spreads the work over GPUs. docs/reproduce.md has the commands.

`imageconductor evaluate export-requests ...` takes the same settings and only writes what other programs need to make
their videos, in the frame of each method: first frames, trajectories, prompts and seeds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from imageconductor.command_line import parse_command_line
from imageconductor.evaluation.evaluate_config import EvaluateConfig


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code: 2 = bad input, 1 = something could not be measured."""
    argv = sys.argv[1:] if argv is None else argv
    if only_export := argv[:1] == ["export-requests"]:
        argv = argv[1:]
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for videos, scores and results"
    )
    config, args = parse_command_line(EvaluateConfig, __doc__ or "", argv, parents=[extra])
    from imageconductor.evaluation.protocol import Evaluation
    from imageconductor.evaluation.report import format_markdown, write_report
    from imageconductor.evaluation.request_files import export_requests
    from imageconductor.evaluation.summary import list_failures

    output: Path = args.output
    try:
        if only_export:
            export_requests(config, output)
            print(output)
            return 0
        evaluation = Evaluation(config, output)
        record = evaluation.run()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if record is not None:
        write_report(evaluation, record, output)
        print(format_markdown(record))
        print(output / "report.html")
        failures = list_failures(record)
        for failure in failures:
            print(f"not measured: {failure}", file=sys.stderr)
        if failures:
            print("all else is written; the same command measures what is missing", file=sys.stderr)
            return 1
    return 0
