"""Names of Fréchet distances and what they ask of videos, without the networks that `frechet` needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

FrechetName = Literal["fid", "fvd", "frechet_small"]

_FVD_FRAMES = 9  # I3D halves them three times, and its last pool takes two


def check_fvd_frames(frechet: Sequence[str], num_frames: int) -> None:
    """Makes sure that videos are long enough for FVD.

    Raises:
        ValueError: They are not.
    """
    if "fvd" in frechet and num_frames < _FVD_FRAMES:
        raise ValueError(
            f"fvd needs at least {_FVD_FRAMES} frames of a video, which its I3D halves three times, and there are "
            f"{num_frames}; take more, or leave fvd out of frechet"
        )
