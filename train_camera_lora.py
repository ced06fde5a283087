"""Stage 2 (Eq. 1): trains the camera LoRA of the motion ControlNet on camera-only data.

On several GPUs: accelerate launch train_camera_lora.py --config FILE [key=value ...]
An interrupted run goes on where it stopped. `train.py` trains this stage and all others.
"""

import sys

from imageconductor.training.command import main
from train import previews

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", previews, stage="camera_lora"))
