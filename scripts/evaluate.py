"""Measures how well a model follows what is drawn, on held-out scenes of the sprite world.

Writes results.json, table.md and a contact sheet for each arm.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from tqdm.auto import tqdm

from imageconductor import config as config_file
from imageconductor.evaluation.protocol import EvaluateConfig, PipelineGenerate, evaluate
from imageconductor.sampling.video import contact_sheet, draw_trajectories, watchable


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 2 = bad input, told in one line."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the results")
    config, args = config_file.command_line(EvaluateConfig, __doc__ or "", argv, parents=[extra])
    output: Path = args.output
    try:
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} exists and is not empty; name another --output")
        generate = PipelineGenerate(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    record, videos = evaluate(
        config, generate, generate.size, generate.num_frames, progress=lambda jobs: tqdm(jobs, unit="batch")
    )
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        (temporary / "results.json").write_text(json.dumps(record, indent=1))
        table = format_table(record)
        (temporary / "table.md").write_text(table)
        for arm, made in videos.items():
            rows = []
            for request, video in made[:8]:
                large, factor = watchable(video)
                rows.append((request.key, draw_trajectories(large, request.trajectories, factor)))
            contact_sheet(temporary / f"{arm}.png", rows)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(table)
    print(output / "results.json")
    return 0


def format_table(record: dict) -> str:
    """The figures as Markdown."""
    lines = ["| figure | mean | 95 % interval | n |", "|---|---|---|---|"]
    for name, figure in record["intervals"].items():
        lines.append(f"| {name} | {figure['mean']:.2f} | {figure['low']:.2f} .. {figure['high']:.2f} | {figure['n']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
