"""The motion score of section 2.2: how much a clip moves, by optical flow between its adjacent frames."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imageconductor.curation.curate_config import CurateConfig


def motion_scores(clips: Sequence[NDArray[np.uint8]], config: CurateConfig) -> list[float]:
    """Frobenius norm of the optical flow between adjacent frames, mean over the pairs, for each clip.

    Args:
        clips: Each (T, H, W, 3), of one size.
        config: `flow` chooses DIS (OpenCV) or RAFT, which takes `raft_batch` pairs at a time, whosever they are.

    Returns:
        Square root of the sum over pixels of u^2 + v^2, in pixels: a shift of all by d scores d sqrt(H W).
    """
    norms = _raft(clips, config) if config.flow == "raft" else _dis(clips)
    return [float(np.mean(list(itertools.islice(norms, len(clip) - 1)))) for clip in clips]


def _norm(flow: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(flow, dtype=np.float64).sum()))


def _dis(clips: Sequence[NDArray[np.uint8]]) -> Iterator[float]:
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # type: ignore[attr-defined]
    for clip in clips:
        grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in clip]
        for before, after in itertools.pairwise(grey):
            yield _norm(flow.calc(before, after, None))


def _raft(clips: Sequence[NDArray[np.uint8]], config: CurateConfig) -> Iterator[float]:
    import torch

    network, device = raft(str(config.raft_weights), config.device)
    pairs = ((before, after) for clip in clips for before, after in itertools.pairwise(clip))
    while batch := list(itertools.islice(pairs, config.raft_batch)):
        before, after = (
            torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            for pictures in zip(*batch, strict=True)
        )
        with torch.inference_mode():
            flows = network(before, after)[-1].permute(0, 2, 3, 1).float().cpu().numpy()
        yield from map(_norm, flows)


@lru_cache(maxsize=1)
def raft(weights: str, device: str | None) -> tuple[Any, str]:
    """Torchvision's RAFT with the user's weights, loaded once a process, and its device."""
    import torch

    try:
        from torchvision.models.optical_flow import raft_large  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # A torchvision of another torch raises the latter.
        raise ValueError(f"flow=raft needs a torchvision that fits this torch: {error}") from error
    network = raft_large()
    try:
        network.load_state_dict(torch.load(Path(weights), map_location="cpu", weights_only=True))
    except Exception as error:  # No file, no state dict, or another one.
        raise ValueError(f"raft_weights={weights}: not torchvision's raft_large: {str(error)[:200]}") from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return network.to(device).eval(), device


def least_moving(scores: NDArray[np.float64], keys: NDArray[np.bytes_], share: float) -> tuple[float, str] | None:
    """The highest (score, key) among the `share` of all clips that move least, rounded down; None if that is none.

    Clips up to it are dropped; equal scores go by key. A global quantile, and so a matter for the whole data set: it is
    asked once, when all scores are known.
    """
    count = int(len(scores) * share)
    if not count:
        return None
    last = np.lexsort((keys, scores))[count - 1]
    return float(scores[last]), bytes(keys[last]).decode()
