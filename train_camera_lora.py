"""Stage 2 (Eq. 1): trains the camera LoRA of the motion ControlNet on camera-only data.

On several GPUs: accelerate launch train_camera_lora.py --config FILE [key=value ...]
An interrupted run goes on where it stopped. `train.py` trains this stage and all others.
"""

import sys

from imageconductor.commands.train import main

if __name__ == "__main__":
    sys.exit(main(stage="camera_lora", description=__doc__ or ""))
