"""Trains a style LoRA of the UNet's spatial attention on clips of a style; `sample.py --lora` takes it.

On several GPUs: accelerate launch scripts/train_style_lora.py --config FILE [key=value ...]
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
    sys.exit(main(StageName.STYLE_LORA, __doc__ or "", previews))
