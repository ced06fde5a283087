"""Stage 1: trains the motion ControlNet on mixed data, with dense or with sparse trajectories (--config says which).

On several GPUs: accelerate launch train_motion_controlnet.py --config FILE [key=value ...]
An interrupted run goes on where it stopped. `train.py` trains this stage and all others.
"""

import sys

from imageconductor.training.command import main
from train import previews

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", previews, stage="motion_controlnet"))
