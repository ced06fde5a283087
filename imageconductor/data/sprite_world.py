"""Settings of the sprite world. Nothing here needs torch, so that commands can show them at once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

SHAPE_NAMES = ("circle", "square", "triangle", "star", "diamond", "heart", "cross")
PATTERN_NAMES = ("striped", "checked", "dotted")

SPRITE_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 32, 44),
    "orange": (255, 128, 0),
    "yellow": (255, 222, 24),
    "green": (22, 172, 64),
    "cyan": (20, 214, 230),
    "blue": (34, 74, 236),
    "purple": (140, 40, 212),
    "pink": (255, 92, 184),
}


class SpriteSet(str, Enum):
    """The moving parts: the camera (as in RealEstate10K), both (as in WebVid), or the sprites (for evaluation)."""

    CAMERA = "camera"
    MIXED = "mixed"
    OBJECT = "object"


@dataclass(frozen=True)
class SpriteWorldConfig:
    """Settings of one endless set of clips; the defaults are the bundled model's world.

    Lengths are fractions of the frame's shorter side; ranges are (low, high) over a whole clip.
    """

    size: tuple[int, int] = (128, 128)  # (W, H) in pixels
    num_frames: int = 16  # frames per clip
    kind: SpriteSet = SpriteSet.MIXED  # what moves: camera, object (the sprites), or mixed (both)
    min_sprites: int = 2  # a clip has min_sprites..max_sprites sprites, each number equally likely
    max_sprites: int = 3  # at most 3
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "star", "heart")  # shapes of the sprites
    # Colours of the sprites, each at most once in a clip.
    colours: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple")
    patterns: tuple[str, ...] = PATTERN_NAMES  # patterns on the sprites: striped, checked, dotted; none = plain sprites
    keep_clear: bool = True  # sprites stay whole in view and clear of each other during the whole clip
    background_contrast: float = 0.5  # in (0, 1]; less brings the background's two colours nearer to each other
    camera_pan: tuple[float, float] = (0.15, 0.35)  # range of a pan, as a fraction of the shorter side
    camera_zoom: tuple[float, float] = (1.2, 1.5)  # range of the zoom ratio, at least 1; half of the zooms go out
    camera_roll_deg: tuple[float, float] = (12.0, 28.0)  # range of a roll in degrees, in either direction
    sprite_radius: tuple[float, float] = (0.12, 0.18)  # range of the radii, as fractions of the shorter side
    sprite_travel: tuple[float, float] = (0.15, 0.4)  # range of the distances that sprites move, as such fractions
    sprite_growth: tuple[float, float] = (1.0, 1.0)  # range of the ratio by which sprites grow; half of them shrink
    still_prob: float = 0.4  # mixed set: probability that the camera, or any sprite but the first, stays still
    caption_motion_prob: float = 0.5  # probability that a caption also names the motion
    grid: int = 16  # tracked points along each side of the first frame
    seed: int = 0  # seed of the set; another one gives a validation set
    style: Literal["colour", "ink"] = "colour"  # ink: the same brightness in blue ink on cream paper

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", SpriteSet(self.kind))
        ranges = ("camera_pan", "camera_zoom", "camera_roll_deg", "sprite_radius", "sprite_travel", "sprite_growth")
        for name in ("size", *ranges):
            value = tuple(getattr(self, name))  # YAML gives lists
            object.__setattr__(self, name, value)
            if len(value) != 2:
                raise ValueError(f"{name} needs two values, got {value}")
            if name != "size" and not 0 <= value[0] <= value[1]:
                raise ValueError(f"{name} must be a range with 0 <= low <= high, got {value}")
        if min(self.size) < 16:
            raise ValueError(f"size must be at least 16 x 16 pixels, got {self.size}")
        if self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        for name, known in (("shapes", SHAPE_NAMES), ("colours", SPRITE_COLOURS), ("patterns", PATTERN_NAMES)):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise ValueError(f"{name}: there is no {unknown[0]!r}, only {', '.join(known)}")
        if not self.shapes:
            raise ValueError("shapes must name at least one")
        if not 1 <= self.max_sprites <= 3:
            raise ValueError(f"max_sprites must be 1, 2 or 3, got {self.max_sprites}")
        if not 1 <= self.min_sprites <= self.max_sprites:
            raise ValueError(f"min_sprites must lie in 1..max_sprites={self.max_sprites}, got {self.min_sprites}")
        if len(set(self.colours)) < self.max_sprites:
            raise ValueError(f"colours must name at least max_sprites={self.max_sprites}, got {self.colours}")
        if not 0 < self.background_contrast <= 1:
            raise ValueError(f"background_contrast must lie in (0, 1], got {self.background_contrast}")
        for name in ("camera_zoom", "sprite_growth"):
            if getattr(self, name)[0] < 1:
                raise ValueError(f"{name} is a ratio of at least 1, got {getattr(self, name)}")
        if not 0 < self.sprite_radius[0] <= self.sprite_radius[1] <= 0.3:
            raise ValueError(f"sprite_radius must lie in (0, 0.3], got {self.sprite_radius}")
        for name in ("still_prob", "caption_motion_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.grid < 1:
            raise ValueError(f"grid must be at least 1, got {self.grid}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
