"""Stage 3 (Eqs. 2-4): trains the object LoRA on mixed data; the camera LoRA is active and frozen.

On several GPUs: accelerate launch train_object_lora.py --config FILE [key=value ...]
An interrupted run goes on where it stopped. `train.py` trains this stage and all others.
"""

import sys

from imageconductor.commands.train import main

if __name__ == "__main__":
    sys.exit(main(stage="object_lora", description=__doc__ or ""))
