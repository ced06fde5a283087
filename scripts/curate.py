"""Turns raw video into shards of clips with tracks and captions, for training (section 2.2; docs/data.md).

Reads a folder of videos, a CSV or RealEstate10K; writes clips-*.tar, index.parquet (a row for each source, with the
reason if it was rejected) and report.html into output=DIR. Run it again after an interruption, even a kill: what is
done stays, and the result is the same.

    python scripts/curate.py --config configs/curate/folder.yaml input=VIDEOS output=data/mine
"""

from __future__ import annotations

import logging
import sys

from imageconductor import config as config_file
from imageconductor.curation.curate_config import CurateConfig


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 2 = bad input, 1 = the machine failed."""
    config, _ = config_file.command_line(CurateConfig, __doc__ or "", argv)
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
    except RuntimeError as error:  # The machine's fault, such as a full GPU.
        print(f"error: {error}; mended, the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    for what, count in counts.most_common():
        print(f"{count:8d}  {what}")
    print(f"{config.output}/index.parquet, {config.output}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
