"""Stage 3 (Eqs. 2-4): trains the object LoRA on mixed data; the camera LoRA is active and frozen.

On several GPUs: accelerate launch train_object_lora.py --config FILE [key=value ...]
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
    sys.exit(main(StageName.OBJECT_LORA, __doc__ or "", previews))
