"""A fixed set of requests, so that tables can be compared: presets, seeds and places for images, in one small file.

The images are the user's: the i-th one by name takes place i. `configs/evaluate/table1_requests.json` is the set for
the paper's protocol, 10 camera and 10 object trajectories for each image at 384 x 256 and 16 frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from imageconductor.conditioning.preset_names import CAMERA_PRESETS, OBJECT_PRESETS
from imageconductor.conditioning.presets import camera_preset, object_preset
from imageconductor.conditioning.trajectory_json import check_size
from imageconductor.files import find_shipped

_KEYS = ("size", "num_frames", "strength", "camera_presets", "object_presets", "trajectories_sha256", "seeds")


@dataclass(frozen=True)
class FixedRequests:
    """What the file fixes.

    Attributes:
        path: The file.
        sha256: Of the file, hexadecimal.
        size: (W, H) of the frame in which the trajectories are drawn.
        num_frames: Points of each track.
        strength: Factor on the reach of the presets.
        presets: Names by set, camera and object.
        seeds: By set, a row for each image and a seed for each preset.
    """

    path: str
    sha256: str
    size: tuple[int, int]
    num_frames: int
    strength: float
    presets: Mapping[str, list[str]]
    seeds: Mapping[str, list[list[int]]]

    @classmethod
    def load(cls, path: str | Path) -> FixedRequests:
        """The set in a file.

        Raises:
            FileNotFoundError: There is no file.
            ValueError: It holds no set of requests, or this version draws its presets in another way.
        """
        path = find_shipped(path)
        if not path.is_file():
            raise FileNotFoundError(f"fixed_requests: no file at {path}")
        data = path.read_bytes()
        try:
            content = cast("dict[str, Any]", json.loads(data.decode("utf-8")))
            missing = [key for key in _KEYS if key not in content]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a JSON file of fixed requests: {error}") from None
        if not isinstance(content, dict) or missing:
            raise ValueError(f"{path}: not a set of fixed requests, it lacks {', '.join(missing)}")
        presets = {"camera": content["camera_presets"], "object": content["object_presets"]}
        strength, num_frames = content["strength"], content["num_frames"]
        if not isinstance(num_frames, int) or num_frames < 2 or not isinstance(strength, int | float) or strength <= 0:
            raise ValueError(f"{path}: num_frames {num_frames!r} or strength {strength!r} is no positive number")
        _check_table(path, presets, content["seeds"])
        size = check_size(content["size"], str(path))
        digest = hashlib.sha256(data).hexdigest()
        fixed = cls(str(path), digest, size, num_frames, float(strength), presets, content["seeds"])
        if (drawn := fixed.digest_trajectories()) != content["trajectories_sha256"]:
            raise ValueError(f"{path}: this version draws the presets in another way (sha256 {drawn})")
        return fixed

    @property
    def num_images(self) -> int:
        """Number of places for images."""
        return len(self.seeds["camera"])

    def digest_trajectories(self) -> str:
        """SHA-256 of the points of all presets, to 0.001 px, objects starting in the middle of the frame."""
        digest = hashlib.sha256()
        middle = ((self.size[0] - 1) / 2, (self.size[1] - 1) / 2)
        for name in self.presets["camera"]:
            tracks = camera_preset(name, self.size, self.num_frames, strength=self.strength)
            digest.update(_encode(name, tracks.points.tolist()))
        for name in self.presets["object"]:
            tracks = object_preset(name, self.size, self.num_frames, start=middle, strength=self.strength)
            digest.update(_encode(name, tracks.points.tolist()))
        return digest.hexdigest()


def _encode(name: str, points: list[list[list[float]]]) -> bytes:
    numbers = [[[round(x * 1000 + 0.25), round(y * 1000 + 0.25)] for x, y in track] for track in points]
    return json.dumps([name, numbers]).encode()


def _check_table(path: str | Path, presets: Mapping[str, Any], seeds: Any) -> None:
    """Raises ValueError unless seeds have a row for each image and a column for each preset, all of them known."""
    for kind, known in (("camera", CAMERA_PRESETS), ("object", OBJECT_PRESETS)):
        names = presets[kind]
        if not isinstance(names, list) or not names or (unknown := [n for n in names if n not in known]):
            raise ValueError(f"{path}: {kind}_presets must be names among {', '.join(known)}, got {unknown or names!r}")
        rows = seeds.get(kind) if isinstance(seeds, dict) else None
        if (
            not isinstance(rows, list)
            or not rows
            or any(
                not isinstance(row, list)
                or len(row) != len(names)
                or not all(type(seed) is int and 0 <= seed < 2**63 for seed in row)
                for row in rows
            )
        ):
            raise ValueError(f"{path}: seeds.{kind} must have rows of {len(names)} whole numbers, one for each preset")
    if len(seeds["camera"]) != len(seeds["object"]):
        counts = f"{len(seeds['camera'])} and {len(seeds['object'])}"
        raise ValueError(f"{path}: the sets must have seeds for equally many images, got {counts}")
