"""What an engine refuses; what it computes is in test_processes.py."""

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from imageconductor import processes
from imageconductor.training import engines
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


def test_deepspeed_is_not_left_to_accelerate_before_training_either(monkeypatch):
    """On GPUs accelerate would note it as the kind of launch, and want its settings from the next `Accelerator`."""
    seen = []
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(processes, "PartialState", lambda **_: seen.append(parse_flag_from_env(*ZERO)))
    processes.start_processes()
    assert seen == [False]
    assert parse_flag_from_env(*ZERO)


def test_a_second_stage_under_fsdp_begins_as_the_first_one_did(monkeypatch):
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda", 0))
    engines._forget_fsdp()
    assert PartialState().distributed_type == DistributedType.MULTI_GPU


def test_without_a_launcher_everything_is_in_one_process():
    assert type(build_engine(LoopConfig(output="runs/none"))) is Replicated
