"""The command of `train.py` and of the three scripts that train one stage each."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imageconductor.command_line import describe
from imageconductor.training.stages.registry import STAGES, find_stage, load_config, stated_stage
from imageconductor.training.train_config import TrainConfig

if TYPE_CHECKING:
    from imageconductor.training.run import PreviewFactory


def main(
    description: str, previews: PreviewFactory, stage: str | None = None, argv: Sequence[str] | None = None
) -> int:
    """Runs a training command and gives its exit code; 2 = bad input, told in one line.

    Args:
        description: Shown by `--help`, before the list of settings.
        previews: Makes the previews, as `run_stage`.
        stage: The only stage that the command trains; None = the one that the settings name.
        argv: Arguments; None = the command line's.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        parser = build_parser(description, stage, argv)
        args = parser.parse_intermixed_args(argv)
        config = load_config(args.config, args.overrides, stage)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from accelerate import PartialState

    from imageconductor.training.loop import leave
    from imageconductor.training.run import run_stage

    try:
        run_stage(config, previews)
        leave()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if PartialState().is_main_process:
        print(f"{config.output}/{config.stage}")
    return 0


def build_parser(description: str, stage: str | None, argv: Sequence[str]) -> argparse.ArgumentParser:
    """The command's parser, whose help lists the settings of the stage that `argv` names, else what all stages share.

    Raises:
        ValueError: The stage does not exist, or the YAML file cannot be read.
    """
    peek = argparse.ArgumentParser(add_help=False)
    peek.add_argument("--config", type=Path)
    peek.add_argument("overrides", nargs="*")
    known, _ = peek.parse_known_intermixed_args([text for text in argv if text not in ("-h", "--help")])
    name = stated_stage(known.config, known.overrides) or stage
    if name is None:
        lines = [f"  {stage.name:<20} {(stage.__doc__ or '').splitlines()[0]}" for stage in STAGES.values()]
        epilog = "\n".join(["stages:", *lines, "", "Settings that all stages share:", describe(TrainConfig)])
    else:
        epilog = f"stage {name}\n{describe(find_stage(name).Config)}"
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file; what it leaves out keeps its default")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes one setting; wins over the file")
    return parser
