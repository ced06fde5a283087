"""Means over videos with intervals that know how few images the videos come from.

One image gives many videos, and their errors resemble each other, so the bootstrap draws images (or scenes) with all of
their videos: drawing single videos would make intervals too narrow. So are those of few images: of normal values the
interval of two covers the mean in 51 % of cases, of five in 83 %, of ten in 90 % and of 24 in 93 % (4,000 simulations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NAN = float("nan")
MIN_SOURCES = 6
"""Images or scenes that an interval needs."""


@dataclass(frozen=True)
class Figure:
    """Mean over the videos that have a value, and its bootstrap 95 % interval.

    Attributes:
        mean: Of `n` videos; NaN if none has a value.
        low, high: Percentiles of the mean over images drawn anew; NaN below `MIN_SOURCES` images.
        n: Videos with a value.
        num_sources: Images or scenes that these videos come from.
    """

    mean: float
    low: float
    high: float
    n: int
    num_sources: int


def summarise(values: Sequence[float], sources: Sequence[str], seed: int = 0, resamples: int = 2000) -> Figure:
    """Mean over videos; the interval is the percentile bootstrap over the images that they come from.

    Args:
        values: One for each video; those that are not finite do not count.
        sources: Image or scene of each video.
        seed: Of the bootstrap.
        resamples: Draws of the bootstrap.
    """
    array = np.asarray(values, np.float64)
    kept = np.isfinite(array)
    array, names = array[kept], np.asarray(sources, object)[kept]
    if not len(array):
        return Figure(_NAN, _NAN, _NAN, 0, 0)
    unique = list(dict.fromkeys(names))
    sums = np.array([array[names == name].sum() for name in unique])
    counts = np.array([(names == name).sum() for name in unique])
    low = high = _NAN
    if len(unique) >= MIN_SOURCES:
        draws = np.random.default_rng(seed).integers(len(unique), size=(resamples, len(unique)))
        means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
        low, high = (float(value) for value in np.percentile(means, [2.5, 97.5]))
    return Figure(float(array.mean()), low, high, len(array), len(unique))


def summarise_differences(
    values: Sequence[float], baseline: Sequence[float], sources: Sequence[str], seed: int = 0
) -> Figure:
    """Mean of the differences to a baseline on the same requests, where both have a value."""
    return summarise([value - base for value, base in zip(values, baseline, strict=True)], sources, seed)
