"""Trains any stage from its YAML, which says `stage: NAME`.

python train.py --config configs/train/sprites/camera_lora.yaml max_steps=100
On several GPUs: accelerate launch train.py --config FILE [key=value ...]
An interrupted run goes on where it stopped. `--config FILE --help` lists the settings of the file's stage.
"""

import sys
from typing import Any

from imageconductor.training.command import main


def previews(*arguments: Any) -> Any:
    """Preview videos; the import waits until the settings are known to be good."""
    from imageconductor.sampling.preview import VideoPreview

    return VideoPreview(*arguments)


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", previews))
