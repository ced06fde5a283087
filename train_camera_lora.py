"""Stage 2 (Eq. 1): trains the camera LoRA of the motion ControlNet on camera-only data.

On several GPUs: accelerate launch train_camera_lora.py --config FILE [key=value ...]
An interrupted run goes on where it stopped.
"""

import sys
from typing import Any

from imageconductor.training.command import main
from imageconductor.training.train_config import StageName


def previews(*arguments: Any) -> Any:
    """Preview videos; the import waits until the settings are known to be good."""
    from imageconductor.sampling.preview import VideoPreview

    return VideoPreview(*arguments)


if __name__ == "__main__":
    sys.exit(main(StageName.CAMERA_LORA, __doc__ or "", previews))
