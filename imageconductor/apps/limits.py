"""What a visitor of the page may ask for, and refusals that name the field concerned."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from imageconductor.apps.drawing import check_drawing_value
from imageconductor.apps.drawn_boxes import check_drawn_boxes, without_boxes

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Kinds of picture files that are read."""

_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class FieldError(ValueError):
    """A refusal in plain words, and the field of the page that it concerns."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Limits:
    """Bounds of one request and of the queue.

    Attributes:
        image_bytes, image_pixels: Of a picture's file, and of its width times its height.
        preset_bytes: Of the file of a motion preset.
        tracks, points: Of a drawing, those of its camera included; points of all tracks.
        frames, steps, videos: Of a request.
        video_pixels: Width times height of the video.
        prompt_chars: Of a prompt and of a negative prompt.
        waiting: Requests that may wait while one is worked on.
        results: Kept for one visitor; older ones are deleted.
        visits: Visitors whose results are kept; those who were away longest lose them first.
        visit_seconds: Without a sign of the visitor, after which the results are deleted.
    """

    image_bytes: int = 20 * 2**20
    image_pixels: int = 40_000_000
    preset_bytes: int = 2**20
    tracks: int = 64
    points: int = 4096
    frames: int = 64
    steps: int = 100
    videos: int = 9
    video_pixels: int = 1024 * 1024
    prompt_chars: int = 2000
    waiting: int = 16
    results: int = 12
    visits: int = 200
    visit_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < (0 if name == "waiting" else 1):
                raise ValueError(f"{name} must be at least {0 if name == 'waiting' else 1}, got {value}")

    def check_picture(self, path: Path, name: str | None = None) -> tuple[int, int]:
        """Width and height of a picture file, from its header alone: no pixel is decoded.

        Args:
            path: The file.
            name: As the visitor called it; default: the file's name.

        Raises:
            FieldError: No picture of a kind that is read, or one that is too large.
        """
        name = name or path.name
        if not path.is_file():
            raise FieldError("picture", "this picture is no longer kept; choose it again")
        if (size := path.stat().st_size) > self.image_bytes:
            raise FieldError(
                "picture",
                f"{name} has {size / 2**20:.1f} MB, at most {self.image_bytes / 2**20:g} MB are taken; save it smaller",
            )
        try:
            with path.open("rb") as file, Image.open(file, formats=_PICTURE_FORMATS) as image:
                width, height = image.size
        except Image.DecompressionBombError:
            raise FieldError(
                "picture", f"{name} has more pixels than the {self.image_pixels / 1e6:g} megapixels that are taken"
            ) from None
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
            raise FieldError("picture", f"{name} is not a picture; choose a PNG, JPEG or WebP file") from None
        if width * height > self.image_pixels:
            raise FieldError(
                "picture",
                f"{name} has {width} x {height} pixels ({width * height / 1e6:.1f} megapixels), at most "
                f"{self.image_pixels / 1e6:g} megapixels are taken; make it smaller first",
            )
        return width, height

    def check_drawing(
        self,
        drawing: Any,
        num_frames: int,
        name: str = "drawing",
        max_objects: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """A drawing as a trajectory file holds it, and boxes beside it, with everything in it checked.

        Args:
            drawing: From a browser or a visitor's file.
            num_frames: Of the video.
            name: Field that a refusal concerns.
            max_objects: Of the model's object gates; None = it takes no boxes.
            size: (W, H) of the picture that it must be drawn on; None = any.

        Raises:
            FieldError: It is no drawing, a larger one, or one on a picture of another size.
        """
        try:
            check_drawing_value(without_boxes(drawing), num_frames, self.tracks, self.points, size=size)
            check_drawn_boxes(drawing, num_frames, max_objects)
        except ValueError as error:
            raise FieldError(name, str(error)) from error
        return dict(drawing)

    def check_number(self, field: str, what: str, value: Any, low: int, high: int) -> int:
        """A whole number within bounds.

        Raises:
            FieldError: It is none, or lies outside.
        """
        try:
            number = int(value)
            is_whole = number == float(value)
        except (TypeError, ValueError, OverflowError):
            number, is_whole = 0, False
        if not is_whole or not low <= number <= high:
            raise FieldError(field, f"{what} must be a whole number from {low} to {high}, got {str(value)[:40]}")
        return number

    def check_text(self, field: str, what: str, value: Any) -> str:
        """A text that is not too long.

        Raises:
            FieldError: It is longer, or no text.
        """
        if not isinstance(value, str) or len(value) > self.prompt_chars:
            got = f"{len(value)} characters" if isinstance(value, str) else type(value).__name__
            raise FieldError(field, f"{what} must be a text of at most {self.prompt_chars} characters, got {got}")
        return value


def safe_name(name: str, default: str = "file") -> str:
    """The last part of a visitor's file name, with letters, digits, dots, dashes and underscores alone."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return _UNSAFE.sub("-", last).strip(".-")[:80] or default
