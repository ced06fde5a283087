"""Which devices compute in half precision, and what becomes of those that only imitate it."""

import platform
from pathlib import Path

import pytest
import torch

from imageconductor import precision
from imageconductor.config import read_yaml
from imageconductor.precision import choose_precision, has_instructions, warn_of_imitation
from imageconductor.training.run import run_stage
from imageconductor.training.stage_configs import load_config

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[False, True], ids=["imitates", "computes"])
def computes(request, monkeypatch):
    """Whether the CPU has instructions for half precision."""
    monkeypatch.setattr(precision, "has_instructions", lambda *_: request.param)
    return request.param


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file(), reason="needs CPU flags")
@pytest.mark.skipif(not hasattr(torch.cpu, "_is_avx512_bf16_supported"), reason="PyTorch cannot tell")
def test_what_a_cpu_can_do_is_what_its_flags_say():
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    assert has_instructions(torch.bfloat16, CPU) == ("avx512_bf16" in flags)


@pytest.mark.parametrize(("capability", "found"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_cards_before_ampere_imitate_bfloat16(capability, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert has_instructions(torch.bfloat16, torch.device("cuda")) == found
    assert has_instructions(torch.float16, torch.device("cuda"))


def test_auto_is_bf16_where_the_device_computes_it(computes, caplog):
    assert choose_precision("auto", CPU) == ("bf16" if computes else "no")
    assert choose_precision("no", CPU) == "no"
    assert not caplog.text


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_stated_precision_is_kept_with_a_warning_where_it_is_imitated(name, computes, caplog):
    assert choose_precision(name, CPU) == name
    assert ("mixed_precision=auto" in caplog.text) == (not computes)


def test_float32_needs_no_warning(computes, caplog):
    warn_of_imitation(torch.float32, CPU, "")
    warn_of_imitation(torch.bfloat16, torch.device("cuda"), "")
    assert not caplog.text


def test_a_run_records_the_precision_it_has_and_goes_on_with_auto(configure, monkeypatch):
    monkeypatch.setattr(precision, "has_instructions", lambda *_: True)
    config = configure("camera_lora", mixed_precision="auto", max_steps=1)
    run_stage(config)
    assert read_yaml(Path(config.output) / "config.yaml")["mixed_precision"] == "bf16"
    monkeypatch.setattr(precision, "has_instructions", lambda *_: False)
    config.max_steps = 2
    assert run_stage(config).step == 2
    assert read_yaml(Path(config.output) / "config.yaml")["mixed_precision"] == "no"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train/sprites").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_are_meant_for_any_machine_suit_themselves_to_it(path):
    assert load_config(path, []).mixed_precision == "auto"
