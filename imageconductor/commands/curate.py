"""Turns raw video into shards of clips with tracks and captions, for training (section 2.2; docs/data.md).

Reads a folder of videos, a CSV or RealEstate10K; writes clips-*.tar, index.parquet (a row for each source, with the
reason if it was rejected) and report.html into output=DIR. After an interruption, the same command continues where it
stopped, with the same result.

    imageconductor curate --config configs/curate/folder.yaml input=VIDEOS output=data/mine
"""

from __future__ import annotations

import logging
import os
import sys

from imageconductor.command_line import parse_command_line
from imageconductor.curation.curate_config import CurateConfig


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if the machine failed, 2 for bad input, or 130 if interrupted."""
    config, _ = parse_command_line(CurateConfig, __doc__ or "", argv)
    if os.name == "nt":
        print("error: curation needs Linux or macOS; under Windows use WSL", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        from imageconductor.curation.curate import curate

        counts = curate(config)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install -e '.[curate]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # A fault of the machine, such as a full GPU.
        print(f"error: {error}; once that is solved, the same command continues from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        return 130
    for outcome, count in counts.most_common():
        print(f"{count:8d}  {outcome}")
    print(f"{config.output}/index.parquet, {config.output}/report.html")
    return 0
