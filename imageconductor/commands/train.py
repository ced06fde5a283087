"""Trains any stage from its YAML, which says `stage: NAME`.

imageconductor train --config configs/train/sprites/camera_lora.yaml max_steps=100
On several GPUs: accelerate launch train.py --config FILE [key=value ...]
An interrupted run goes on where it stopped. `--config FILE --help` lists the settings of the file's stage.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from imageconductor.command_line import describe, describe_full_memory, peek_settings
from imageconductor.files import find_shipped
from imageconductor.training.stage_configs import STAGE_CONFIGS, check_stage, load_config, stated_stage
from imageconductor.training.train_config import StageConfig

_LESS_MEMORY = (
    "gradient_checkpointing=true, a smaller batch_size with more gradient_accumulation_steps, and optimizer=adamw_8bit "
    "(extra lowmem, for a new run) need less; the settings in configs/train/24gb/ are for one card of 24 GB"
)


def main(argv: Sequence[str] | None = None, stage: str | None = None, description: str = __doc__ or "") -> int:
    """Runs the command and gives its exit code; 2 = bad input, 1 = too little memory, each told in one line.

    Args:
        argv: Arguments; None = the command line's.
        stage: The only stage that the command trains; None = the one that the settings name.
        description: Shown by `--help`, before the list of settings.
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

    from imageconductor.sampling.preview import VideoPreview
    from imageconductor.training.loop import leave
    from imageconductor.training.run import run_stage

    try:
        state = run_stage(config, VideoPreview)
        leave()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if (line := describe_full_memory(error, _LESS_MEMORY)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 1  # at which a launcher stops the other processes
    if PartialState().is_main_process:
        if state.step < config.max_steps:
            print(f"stopped at step {state.step} of {config.max_steps}; the same command goes on", file=sys.stderr)
        result = Path(config.output, config.stage)
        print(result if result.exists() else config.output)  # a stage with several results has a folder for each
    return 0


def build_parser(description: str, stage: str | None, argv: Sequence[str]) -> argparse.ArgumentParser:
    """The command's parser, whose help lists the settings of the stage that `argv` names, else what all stages share.

    Raises:
        ValueError: The stage does not exist, or the YAML file cannot be read.
    """
    name = stated_stage(*peek_settings(argv)) or stage
    if name is None:
        lines = [f"  {name:<20} {(stage.__doc__ or '').splitlines()[0]}" for name, stage in STAGE_CONFIGS.items()]
        epilog = "\n".join(["stages:", *lines, "", "Settings that all stages share:", describe(StageConfig)])
    else:
        epilog = f"stage {name}\n{describe(STAGE_CONFIGS[check_stage(name)])}"
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=find_shipped, metavar="FILE", help="YAML file; what it leaves out keeps its default"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes one setting; wins over the file")
    return parser
