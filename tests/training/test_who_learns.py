"""For each stage: which parameters change, which LoRAs act, and that all else is the same to the byte.

A new stage is a row here.
"""

from typing import NamedTuple

import pytest
import torch

from imageconductor.models.adapters import active_adapters
from imageconductor.training.loop import train
from imageconductor.training.stages.registry import STAGES


class Expected(NamedTuple):
    """What is true of a stage.

    Attributes:
        learns: Beginnings of the names of the parameters that change, in the stage's state dict.
        contains: What the names contain besides.
        frozen: Parameters among them that stay, by their ending.
        acts: LoRAs of the motion ControlNet, and of the UNet, that act.
        settings: That differ from the stage's defaults.
        holds_controlnets: Whether it has ControlNets in memory, which it has only if they are used.
    """

    learns: tuple[str, ...]
    contains: str = ""
    frozen: tuple[str, ...] = ()
    acts: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    settings: dict = {}  # noqa: RUF012
    holds_controlnets: bool = True


FOUNDATION = ("text_encoder.", "unet.", "image_controlnet.")
TABLE = {
    "foundation": Expected(FOUNDATION, frozen=("controlnet.conv_in.weight",)),
    "foundation with a motion ControlNet": Expected(
        (*FOUNDATION, "motion_controlnet."),
        frozen=("controlnet.conv_in.weight",),
        settings={"train_motion_controlnet": True, "motion_dropout": 0.0},
    ),
    "motion_controlnet": Expected(("motion_controlnet.",), frozen=("conv_in.weight",)),
    "camera_lora": Expected(("motion_controlnet.",), ".camera.", acts=(("camera",), ())),
    "object_lora": Expected(("motion_controlnet.",), ".object.", acts=(("camera", "object"), ())),
    "style_lora": Expected(("unet.",), ".style.", acts=((), ("style",))),
    "few_step": Expected(("unet.",), ".few_step.", acts=((), ("few_step",))),
    "object_gates": Expected(("object_gates.",), holds_controlnets=False),
    "object_gates with the first frame": Expected(("object_gates.",), settings={"first_frame": True, "num_frames": 4}),
    "scene_gates": Expected(("scene_gates.", "unet.lora."), acts=((), ("motion",))),
    "scene_gates without a LoRA": Expected(("scene_gates.",), settings={"motion_lora_rank": 0}),
    "scene_gates jointly": Expected(
        ("object_gates.", "scene_gates."), settings={"learns_object_gates": True, "motion_lora_rank": 0}
    ),
    "motion_director": Expected(
        ("unet.",),
        ".lora_",
        acts=((), ("motion",)),
        settings={"appearance_dropout": 0.0, "max_steps": 4},
        holds_controlnets=False,
    ),
    "motion_director with first frames": Expected(
        ("unet.",),
        ".lora_",
        acts=((), ("motion",)),
        settings={"appearance_dropout": 0.0, "max_steps": 4, "first_frame": True},
    ),
    "motion_director of images": Expected(
        ("unet.",),
        ".appearance.",
        acts=((), ("appearance",)),
        settings={"learns_motion": False, "appearance": "shared"},
        holds_controlnets=False,
    ),
}


def _is_named(key, beginnings):
    """Whether a name has one of the beginnings; NETWORK.lora. are all LoRA tensors of a network."""
    return any(
        ".lora_" in key and key.startswith(name.removesuffix("lora."))
        if name.endswith(".lora.")
        else key.startswith(name)
        for name in beginnings
    )


def test_every_stage_has_a_row():
    assert {name.partition(" ")[0] for name in TABLE} == set(STAGES)


@pytest.mark.parametrize("name", TABLE)
def test_only_what_the_table_says_changes(name, configure, build, parameters):
    expected = TABLE[name]
    config = configure(name.partition(" ")[0], **expected.settings)
    stage, data = build(config)
    wanted = {
        key
        for key, _ in stage.named_parameters()
        if _is_named(key, expected.learns) and expected.contains in key and not key.endswith(expected.frozen or ("\0",))
    }
    assert set(parameters(stage)) == wanted
    before = {key: value.detach().clone() for key, value in stage.state_dict().items()}
    train(stage, data, config)
    changed = {key for key, value in stage.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= wanted, "a frozen tensor has changed"
    assert len(changed) > 0.8 * len(wanted), "much of what should learn has not"
    held = [network is not None for network in (stage.image_controlnet, stage.motion_controlnet)]
    assert held == [expected.holds_controlnets] * 2
    of_motion = active_adapters(stage.motion_controlnet) if expected.holds_controlnets else ()
    assert (of_motion, active_adapters(stage.unet)) == expected.acts
    assert set(stage.adapters) == set(expected.acts[0])
