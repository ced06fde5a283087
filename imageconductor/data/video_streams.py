"""Which stream of a container players choose, and how they turn its frames; needs PyAV, which not every system has."""

from __future__ import annotations

from typing import Any

import numpy as np
from av.sidedata.sidedata import Type as SideType
from av.stream import Disposition
from numpy.typing import NDArray

_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


def rank_stream(stream: Any) -> tuple[bool, bool, int]:
    """Ranks video streams as players do: no cover or thumbnail, then the one marked as default, then the largest."""
    codec, flags = stream.codec_context, stream.disposition
    area = codec.width * codec.height if codec is not None else 0
    return area > 0 and not flags & _PICTURES, bool(flags & Disposition.default), area


def read_orientation(frame: Any) -> tuple[bool, bool, bool]:
    """The operations that turn a frame upright: whether to exchange x and y, then to mirror x, to mirror y."""
    for side in frame.side_data:
        if side.type == SideType.DISPLAYMATRIX:
            (a, b, _), (c, d, _), _ = np.frombuffer(bytes(side), np.int32).reshape(3, 3)
            # x' = a x + c y, y' = b x + d y; other angles are rounded to the nearest right one.
            return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)
    return False, False, False


def turn_upright(picture: NDArray[np.uint8], orientation: tuple[bool, bool, bool]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) after the operations that `read_orientation` gives."""
    exchanged, mirrors_x, mirrors_y = orientation
    if exchanged:
        picture = picture.transpose(1, 0, 2)
    return np.ascontiguousarray(picture[:: -1 if mirrors_y else 1, :: -1 if mirrors_x else 1])
