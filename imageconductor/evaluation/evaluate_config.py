"""What an evaluation is: which methods are asked for what, and how the answers are measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from imageconductor.conditioning.presets import CAMERA_PRESETS, OBJECT_PRESETS

RequestSet = Literal["camera", "object"]
FrechetName = Literal["fid", "fvd", "frechet_small"]


@dataclass(frozen=True)
class Arm:
    """One way to ask for the videos of a set."""

    requests: RequestSet = "object"  # which set: camera motions, or motions of objects
    control: Literal["camera", "object", "mixed", "base", "none"] = "object"  # none = no trajectories are given
    camera_free_scale: float | None = None  # lambda_trajs of Eq. 5


@dataclass(frozen=True)
class Row:
    """One line of the table: a model, or a folder of videos that were made elsewhere."""

    model: str | None = None  # model folder
    videos: str | None = None  # folder with ARM/KEY.mp4, as an evaluation writes it under videos/ROW
    base: str | None = None  # DreamBooth file over the model's UNet, VAE and text encoder
    lora: list[str] = field(default_factory=list)  # style LoRAs, FILE or FILE:scale
    motion_lora: list[str] = field(default_factory=list)  # likewise, of the motion modules

    def __post_init__(self) -> None:
        if (self.model is None) == (self.videos is None):
            raise ValueError(f"a row needs a model or videos, and not both; got {self.model} and {self.videos}")
        if self.videos is not None and (self.base or self.lora or self.motion_lora):
            raise ValueError(f"base and LoRAs go with a model, not with the videos in {self.videos}")


@dataclass
class EvaluateConfig:
    """What is measured, of what, and how."""

    model: str | None = None  # model folder; one row of the table
    videos: str | None = None  # folder of videos made elsewhere; one more row
    rows: dict[str, Row] = field(default_factory=dict)  # further rows, by name
    arms: dict[str, Arm] = field(default_factory=dict)  # by name; none = camera and object, as Table 1
    # Folder of first frames, each with NAME.json: {"caption": "...", "objects": [[x, y], ...]}; null = sprite scenes.
    images: str | None = None
    motions: Literal["presets", "own"] = "presets"  # the paper's 10 and 10, or what a sprite scene itself does
    camera_presets: list[str] = field(default_factory=lambda: list(CAMERA_PRESETS))
    object_presets: list[str] = field(default_factory=lambda: list(OBJECT_PRESETS))
    strength: float = 1.0  # of the presets
    num_scenes: int = 16  # sprite scenes a set
    world_seed: int = 10_000  # of the sprite scenes; training uses 0
    style: Literal["colour", "ink"] = "colour"  # of the sprite scenes
    num_points: int = 4  # background points that name a sprite scene's own camera motion
    size: tuple[int, int] | None = None  # (W, H) of the videos; null = the model's, 384 x 256 where there is none
    num_frames: int | None = None  # null = the model's, or 16
    seed: int = 0  # of the initial noise; request i takes seed + i
    num_inference_steps: int | None = None  # null = the model's default, here and below
    guidance_scale: float | None = None
    trajectory_guidance_scale: float | None = None
    batch_size: int = 4
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # null = float16 on a GPU
    device: str | None = None
    tracker: Literal["lucas_kanade", "cotracker"] = "lucas_kanade"
    cotracker: str = "facebookresearch/co-tracker"  # repository for torch.hub, or its local clone
    clip: str | None = None  # CLIP folder or hub name, for text similarity and frame consistency; null = not measured
    frechet: list[FrechetName] = field(default_factory=list)
    frechet_arms: list[str] = field(default_factory=lambda: ["camera", "object"])  # whose videos they speak of
    fid_weights: str | None = None  # pytorch-fid's Inception-v3
    fvd_weights: str | None = None  # I3D as TorchScript
    reference: str | None = None  # folder of mp4 files to compare with; null = clips of the sprite world
    num_reference: int = 256  # of them, by name; the paper takes 5,000 of WebVid
    reference_stride: int = 1  # frames from one to the next, e.g. 3 for footage at 24 fps beside videos at 8 fps
    shown: int = 12  # videos of an arm in the report, the worst first

    def __post_init__(self) -> None:
        for name in ("num_scenes", "num_points", "batch_size", "num_reference", "reference_stride", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.strength <= 0:
            raise ValueError(f"strength must be positive, got {self.strength}")
        for name, known in (("camera_presets", CAMERA_PRESETS), ("object_presets", OBJECT_PRESETS)):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise ValueError(f"{name}: there is no {', '.join(unknown)}; there are {', '.join(known)}")
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one motion")
        if self.motions == "own" and self.images is not None:
            raise ValueError("motions=own needs scenes whose motion is known: leave images out")
        if not self.arms:
            self.arms = {"camera": Arm("camera", "camera"), "object": Arm("object", "object")}
        for name in (*self.arms, *self.rows):
            if name != Path(name).name or name.startswith("."):
                raise ValueError(f"rows and arms give folders their names; {name!r} is none")
        for name, arm in self.arms.items():
            if arm.camera_free_scale is not None and arm.control != "object":
                raise ValueError(f"arm {name}: camera_free_scale goes with control object, not {arm.control}")
        if self.frechet and (unknown := sorted(set(self.frechet_arms) - set(self.arms))):
            raise ValueError(f"frechet_arms: there is no arm {', '.join(unknown)}; there are {', '.join(self.arms)}")
        if self.frechet and self.reference is None and self.images is not None:
            raise ValueError(f"{', '.join(self.frechet)} needs videos to compare with: reference=FOLDER")
        for name in ("fid", "fvd"):
            if name in self.frechet and getattr(self, f"{name}_weights") is None:
                raise ValueError(f"{name} needs {name}_weights=FILE; docs/reproduce.md says where to get it")
        if not self.table:
            raise ValueError("nothing to evaluate: give model=FOLDER, videos=FOLDER or rows")

    @property
    def table(self) -> dict[str, Row]:
        """All rows by name; `model` and `videos` are called after their folders."""
        given = [Row(model=self.model)] if self.model is not None else []
        given += [Row(videos=self.videos)] if self.videos is not None else []
        named = {Path(row.model or row.videos or "").resolve().name: row for row in given}
        if len(named) < len(given) or named.keys() & self.rows.keys():
            raise ValueError(f"two rows have the same name: {', '.join([*named, *self.rows])}; name them under rows")
        return {**named, **self.rows}
