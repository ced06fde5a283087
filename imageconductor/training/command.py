"""What the three training scripts have in common: settings in, a trained part out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from imageconductor import config as config_file
from imageconductor.training.train_config import StageName, TrainConfig

if TYPE_CHECKING:
    from imageconductor.training.run import PreviewOf


def main(stage: StageName, description: str, preview_of: PreviewOf, argv: Sequence[str] | None = None) -> int:
    """Runs a training script and gives its exit code; 2 = bad input, told in one line.

    Args:
        stage: What the script trains.
        description: Shown by `--help`, before the list of all settings.
        preview_of: Makes the previews, as `run_stage`.
        argv: Arguments; None = the command line's.
    """
    config, _ = config_file.command_line(TrainConfig, description, argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # After the settings are known to be good: these load torch.
    from accelerate import PartialState

    from imageconductor.training.run import run_stage

    try:
        run_stage(stage, config, preview_of)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if PartialState().is_main_process:
        print(f"{config.output}/{stage.value}")
    return 0
