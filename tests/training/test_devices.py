"""Which devices compute in half precision, what becomes of those that only imitate it, and what is left in memory."""

import gc
import platform
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from imageconductor import devices
from imageconductor.config import read_yaml
from imageconductor.devices import choose_precision, has_instructions, warn_of_imitation
from imageconductor.training import run
from imageconductor.training.run import run_stage
from imageconductor.training.stage_configs import load_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[False, True], ids=["imitates", "computes"])
def computes(request, monkeypatch):
    """Whether the CPU has instructions for half precision."""
    monkeypatch.setattr(devices, "has_instructions", lambda *_: request.param)
    return request.param


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file(), reason="needs CPU flags")
@pytest.mark.skipif(not hasattr(torch.cpu, "_is_avx512_bf16_supported"), reason="PyTorch cannot tell")
def test_what_a_cpu_can_do_is_what_its_flags_say():
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    assert has_instructions(torch.bfloat16, CPU) == ("avx512_bf16" in flags)


@pytest.mark.parametrize(("capability", "found"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_cards_before_ampere_imitate_bfloat16(capability, found, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert has_instructions(torch.bfloat16, CUDA) == found
    assert has_instructions(torch.float16, CUDA)
    assert choose_precision("bf16", CUDA) == "bf16"
    assert ("mixed_precision=fp16 is faster" in caplog.text) == (not found)


@pytest.mark.parametrize(("architecture", "found"), [("gfx906", False), ("gfx1030", False), ("gfx90a:sramecc+", True)])
def test_cards_of_amd_are_known_by_their_architecture(architecture, found, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=architecture))
    assert has_instructions(torch.bfloat16, CUDA) == found


def test_auto_is_bf16_where_the_device_computes_it(computes, caplog):
    assert choose_precision("auto", CPU) == ("bf16" if computes else "no")
    assert choose_precision("no", CPU) == "no"
    assert not caplog.text


def test_a_stated_precision_is_kept_with_a_warning_where_it_is_imitated(computes, caplog):
    assert choose_precision("bf16", CPU) == "bf16"
    assert ("mixed_precision=auto is faster" in caplog.text) == (not computes)


def test_fp16_on_a_cpu_is_refused_before_weights_are_read(configure, monkeypatch):
    monkeypatch.setattr(run.Networks, "load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="mixed_precision=fp16 needs a GPU"):
        run.run_stage(configure("camera_lora", mixed_precision="fp16"))


def test_float32_needs_no_warning(computes, caplog):
    warn_of_imitation(torch.float32, CPU, "")
    warn_of_imitation(torch.bfloat16, torch.device("mps"), "")
    assert not caplog.text


@pytest.mark.parametrize("has_driver", [True, False])
def test_a_gpu_that_pytorch_cannot_use_is_told(has_driver, monkeypatch, caplog):
    monkeypatch.setattr(devices.shutil, "which", lambda _: "/usr/bin/nvidia-smi" if has_driver else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices.warn_of_idle_gpu()
    assert ("NVIDIA's driver is here" in caplog.text) == has_driver


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train/sprites").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_are_meant_for_any_machine_suit_themselves_to_it(path):
    assert load_config(path, []).mixed_precision == "auto"


def test_a_run_records_the_precision_it_has_and_goes_on_with_auto(configure, monkeypatch):
    monkeypatch.setattr(devices, "has_instructions", lambda *_: True)
    config = configure("camera_lora", mixed_precision="auto", max_steps=1)
    run_stage(config)
    assert read_yaml(Path(config.output) / "config.yaml")["mixed_precision"] == "bf16"
    monkeypatch.setattr(devices, "has_instructions", lambda *_: False)
    config.max_steps = 2
    assert run_stage(config).step == 2
    assert read_yaml(Path(config.output) / "config.yaml")["mixed_precision"] == "no"


def test_a_stage_before_this_one_is_no_longer_in_memory(configure, monkeypatch):
    """Prepared for half precision, networks refer to themselves, and only the garbage collector can free them."""
    load, networks = run.Networks.load, []

    def note(*arguments):
        assert all(reference() is None for reference in networks)
        loaded = load(*arguments)
        networks.append(weakref.ref(loaded.motion_controlnet))
        return loaded

    monkeypatch.setattr(run.Networks, "load", note)
    gc.disable()
    try:
        for number in range(2):
            config = configure("camera_lora", max_steps=1, mixed_precision="bf16")
            run_stage(replace(config, output=f"{config.output}-{number}"))
    finally:
        gc.enable()
    assert len(networks) == 2
