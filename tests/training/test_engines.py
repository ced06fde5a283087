"""What an engine refuses; what it computes is in test_processes.py."""

import pytest

from imageconductor.training.engines import Replicated, build_engine
from imageconductor.training.train_config import LoopConfig

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("variables", "settings", "refused"),
    [
        (FSDP, {"preview_every": 10}, "FSDP does not go with one process, preview_every;"),
        (FSDP | {"FSDP_VERSION": "1"}, {"torch_compile": True}, "FSDP.*torch_compile=true.*fsdp_version other than 2"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "FSDP.*fsdp_offload_params"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, r"DeepSpeed does not go with one process, zero_stage 3"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "DeepSpeed.*offloading"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, {}, "DeepSpeed.*deepspeed_config_file"),
        (ZERO, {"optimizer": "adamw_8bit"}, "DeepSpeed.*optimizer=adamw_8bit"),
        (FSDP, {"optimizer": "muon"}, "FSDP.*optimizer=muon"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_trained(variables, settings, refused, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=refused):
        build_engine(LoopConfig(output="runs/none", **settings))


def test_without_a_launcher_everything_is_in_one_process():
    assert type(build_engine(LoopConfig(output="runs/none"))) is Replicated
