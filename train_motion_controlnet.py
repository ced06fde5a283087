"""Stage 1: trains the motion ControlNet on mixed data, with dense or with sparse trajectories (--config says which).

On several GPUs: accelerate launch train_motion_controlnet.py --config FILE [key=value ...]
An interrupted run goes on where it stopped. `train.py` trains this stage and all others.
"""

import sys

from imageconductor.commands.train import main

if __name__ == "__main__":
    sys.exit(main(stage="motion_controlnet", description=__doc__ or ""))
