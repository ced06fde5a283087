"""Stage 1: trains the motion ControlNet on mixed data, with dense or with sparse trajectories (--config says which).

On several GPUs: accelerate launch train_motion_controlnet.py --config FILE [key=value ...]
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
    sys.exit(main(StageName.MOTION_CONTROLNET, __doc__ or "", previews))
