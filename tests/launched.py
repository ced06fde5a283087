"""What the fixture `run_forked` does in each of its processes; importable there by name."""

import os
import runpy
import sys
import traceback
from pathlib import Path

PRELOADED = ["launched", "imageconductor.training.run", "imageconductor.sampling.preview", "tensorboard"]


def run_rank(arguments, environment, said):
    """Runs a script with its arguments as a launcher would start it; what it prints goes into a file."""
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    with said.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path.cwd()))
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit:
            raise
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
