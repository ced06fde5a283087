"""Settings that say what fresh gates are like, and whether gates that go on learning are so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from imageconductor.checkpoints.model_folder import read_gate_config, reads_first_frame
from imageconductor.checkpoints.personalise import networks_without_weights
from imageconductor.models.gating import gate_places
from imageconductor.models.weights import find_weights
from imageconductor.training.stage_configs import ObjectGatesConfig, SceneGatesConfig

GatesConfig = ObjectGatesConfig | SceneGatesConfig

_OF_OBJECT_GATES = {name: name for name in ("knows_places", "knows_first_boxes", "tells_motion")}
_OF_SCENE_GATES = {  # and what the gates call them
    "parallel": "is_parallel",
    "frame_0_only": "frame_0_only",
    "encoder_channels": "channels",
    "encoder_blocks": "blocks_per_level",
}
_OF_GATES = {"object_gates": _OF_OBJECT_GATES, "scene_gates": _OF_SCENE_GATES}


def settings_of_fresh_gates(config: GatesConfig, kind: str) -> dict[str, Any]:
    """Arguments of fresh "object_gates" or "scene_gates", but for their places and the number of objects."""
    return {key: getattr(config, name) for name, key in _OF_GATES[kind].items()}


def read_gates(config: GatesConfig, kind: str) -> tuple[Path, dict[str, Any] | None]:
    """Folder of the "object_gates" or "scene_gates" to go on from, and their config; None where fresh ones begin."""
    named = config.object_gates if kind == "object_gates" else None
    folder = Path(named or Path(config.model) / kind)
    return folder, None if getattr(config, f"fresh_{kind}") else read_gate_config(folder.parent, folder.name)


def check_gates(config: GatesConfig) -> None:
    """Makes sure that gates to go on from are there and are as the settings say, or that fresh ones can be.

    Settings of fresh gates that are left at their defaults say nothing of those that go on.

    Raises:
        FileNotFoundError: The object gates that are named, or weights of gates, are missing.
        ValueError: Gates are not as a setting says, or the UNet is not for it.
    """
    kinds = ("object_gates", "scene_gates") if isinstance(config, SceneGatesConfig) else ("object_gates",)
    found = {kind: read_gates(config, kind) for kind in kinds}
    if config.object_gates is not None and not found["object_gates"][0].is_dir():
        raise FileNotFoundError(f"no object gates at {config.object_gates}; train stage object_gates first")
    if config.tells_motion and not reads_first_frame(config.model):
        raise ValueError(
            f"tells_motion=true is for a UNet that reads the first frame, and that of {config.model} does not"
        )
    going_on = {kind: (folder, gates) for kind, (folder, gates) in found.items() if gates is not None}
    default = type(config)()
    for kind, (folder, gates) in going_on.items():
        find_weights(folder)
        for name, key in _OF_GATES[kind].items():
            stated, usual = getattr(config, name), getattr(default, name)
            if stated not in (usual, has := gates.get(key, usual)):
                raise _misfit(config, name, folder, f"{name}={json.dumps(has)}", kind)
        if kind == "object_gates" and gates["max_objects"] != config.max_objects:
            count = gates["max_objects"]
            raise ValueError(
                f"max_objects is {config.max_objects}, and the gates at {folder} are made for {count} objects, absent "
                f"ones included; set max_objects={count}"
            )
    if config.places is not None and len(going_on) == len(kinds):  # Otherwise they are those of the fresh ones.
        folder, gates = going_on[kinds[-1]]
        unet = networks_without_weights(Path(config.model)).unet
        if gate_places(unet, config.places).keys() != gates["places"].keys():
            raise _misfit(config, "places", folder, f"other places, {', '.join(gates['places'])}", kinds[-1])


def _misfit(config: GatesConfig, name: str, folder: Path, has: str, kind: str) -> ValueError:
    stated = json.dumps(getattr(config, name))
    return ValueError(
        f"{name}={stated} is of fresh gates, and those at {folder} have {has}; leave it out to go on with them, or set "
        f"fresh_{kind}=true to begin anew"
    )
