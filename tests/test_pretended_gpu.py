"""No tensor stays behind on the CPU where a pipeline or a training is on another device."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch.utils.backend_registration").__dict__.get(
    "_setup_privateuseone_for_python_backend"
) or pytest.skip("this PyTorch takes no device in Python", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["refusal", "sampling", "training", "evaluation"])
def test_work_is_done_on_one_device(work, tmp_path):
    script = Path(__file__).with_name("pretended_gpu.py")
    done = subprocess.run([sys.executable, script, tmp_path, work], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
