"""Measures how well a model follows what is drawn, on held-out scenes of the sprite world.

Writes results.json, table.md, a contact sheet for each arm, and one of the same requests under all arms. Run it again
after an interruption: videos that were made are kept beside the output until it is whole.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from imageconductor import config as config_file
from imageconductor.data.sprites import SpriteSet
from imageconductor.evaluation.protocol import Arm, EvaluateConfig, Generate, PipelineGenerate, Request, evaluate
from imageconductor.sampling.video import Frames, contact_sheet, draw_trajectories, watchable


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

    partial = output.with_name(f".{output.name}.partial")
    record, videos = evaluate(
        config,
        Kept(generate, partial, config),
        generate.size,
        generate.num_frames,
        progress=lambda jobs: tqdm(jobs, unit="batch"),
    )
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        (temporary / "results.json").write_text(json.dumps(record, indent=1))
        table = format_table(record)
        (temporary / "table.md").write_text(table)
        for arm, made in videos.items():
            contact_sheet(temporary / f"{arm}.png", [(r.key, drawn(r, video)) for r, video in made[:8]])
        for kind in SpriteSet.CAMERA, SpriteSet.OBJECT:
            contact_sheet(temporary / f"same_{kind.value}.png", compared(kind, videos))
        if output.exists():
            output.rmdir()
        temporary.rename(output)
        shutil.rmtree(partial)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(table)
    print(output / "results.json")
    return 0


def drawn(request: Request, video: Frames) -> Frames:
    """A video enlarged, with its trajectories."""
    large, factor = watchable(video)
    return draw_trajectories(large, request.trajectories, factor)


def compared(kind: SpriteSet, videos: dict[str, list[tuple[Request, Frames]]]) -> list[tuple[str, Frames]]:
    """The same two requests under every arm of a set, the clips themselves first."""
    arms_of_kind = {name: made for name, made in videos.items() if made[0][0].key.startswith(f"{kind.value}-")}
    rows = []
    for i, (request, _) in enumerate(next(iter(arms_of_kind.values()))[:2]):
        rows.append((f"{request.key}: {request.scene.caption}", drawn(request, request.truth)))
        rows += [(f"{request.key}: {name}", drawn(request, made[i][1])) for name, made in arms_of_kind.items()]
    return rows


class Kept:
    """`generate`, its videos kept in a folder and taken from there when they are asked for again."""

    def __init__(self, generate: Generate, folder: Path, config: EvaluateConfig):
        weights = {str(path): path.stat().st_mtime_ns for path in sorted(Path(config.model).rglob("*.safetensors"))}
        made_with = json.dumps({"config": asdict(config), "weights": weights}, default=str)
        record = folder / "made_with.json"
        if not record.exists() or record.read_text() != made_with:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            record.write_text(made_with)
        self.generate, self.folder = generate, folder

    def __call__(self, requests: list[Request], arm: Arm, seeds: list[int]) -> Frames:
        """See `Generate`."""
        path = self.folder / f"{arm.name}-{seeds[0]}.npy"
        if not path.exists():
            temporary = path.with_name(f".{path.name}")
            np.save(temporary, self.generate(requests, arm, seeds))
            temporary.rename(path)
        return np.load(path)


def format_table(record: dict) -> str:
    """The figures as Markdown."""
    lines = ["| figure | mean | 95 % interval | n |", "|---|---|---|---|"]
    for name, figure in record["intervals"].items():
        lines.append(f"| {name} | {figure['mean']:.2f} | {figure['low']:.2f} .. {figure['high']:.2f} | {figure['n']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
