"""Start-up: what is imported before it is needed, and how the benchmark reads it."""

import subprocess
import sys
from pathlib import Path

from start_up import Package, read_packages

ROOT = Path(__file__).parents[2]
_LIST = "import sys; before = set(sys.modules); import {module}; print(*sorted(set(sys.modules) - before))"


def imported_by(module):
    """Modules that the import of one adds in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _LIST.format(module=module)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return done.stdout.split()


def test_the_package_imports_nothing_until_a_part_of_it_is_asked_for():
    assert imported_by("imageconductor") == ["imageconductor"]


def test_the_options_of_sampling_are_known_without_any_large_library():
    packages = {name.partition(".")[0] for name in imported_by("imageconductor.commands.sample")}
    heavy = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "scipy", "cv2", "PIL", "imageio"}
    assert not packages & heavy


def test_import_times_are_those_of_a_packages_own_modules():
    report = """
import time: self [us] | cumulative | imported package
import time:       100 |        100 |       torch._C
import time:       700 |        800 |     torch
import time:        60 |         60 |       numpy
import time:        50 |        110 |     scipy.stats
import time:         1 |          1 |       imageconductor
import time:         2 |          3 |     imageconductor.config
import time:        20 |         20 |     torch.hub
import time:        30 |        963 |   imageconductor.models
import time:         5 |        965 | imageconductor.sampling
"""
    assert read_packages(report) == [
        Package("torch", 820e-6, "imageconductor.models"),
        Package("numpy", 60e-6, "scipy.stats"),
        Package("scipy", 50e-6, "imageconductor.models"),
        Package("imageconductor.models", 30e-6, "imageconductor.sampling"),
        Package("imageconductor.sampling", 5e-6, "the command"),
        Package("imageconductor.config", 2e-6, "imageconductor.models"),
        Package("imageconductor", 1e-6, "imageconductor.config"),
    ]
