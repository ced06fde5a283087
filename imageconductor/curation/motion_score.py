"""The motion score of section 2.2: the magnitude of the optical flow between adjacent frames of a clip."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imageconductor.curation.curate_config import CurateConfig


def motion_scores(clips: Sequence[NDArray[np.uint8]], config: CurateConfig) -> list[float]:
    """Frobenius norm of the optical flow between adjacent frames, averaged over the pairs of each clip.

    Args:
        clips: Each (T, H, W, 3), all of one size.
        config: `flow` chooses DIS (OpenCV) or RAFT, whose batches of `raft_batch` pairs may span clips.

    Returns:
        For each clip the square root of the sum over pixels of u^2 + v^2, in pixels: a picture that shifts by d scores
        d sqrt(H W).
    """
    norms = _raft_norms(clips, config) if config.flow == "raft" else _dis_norms(clips)
    return [float(np.mean(list(itertools.islice(norms, len(clip) - 1)))) for clip in clips]


def _frobenius_norm(flow: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(flow, dtype=np.float64).sum()))


def _dis_norms(clips: Sequence[NDArray[np.uint8]]) -> Iterator[float]:
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # type: ignore[attr-defined]
    for clip in clips:
        grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in clip]
        for before, after in itertools.pairwise(grey):
            yield _frobenius_norm(flow.calc(before, after, None))


def _raft_norms(clips: Sequence[NDArray[np.uint8]], config: CurateConfig) -> Iterator[float]:
    import torch

    network, device = load_raft(str(config.raft_weights), config.device)
    pairs = ((before, after) for clip in clips for before, after in itertools.pairwise(clip))
    while batch := list(itertools.islice(pairs, config.raft_batch)):
        before, after = (
            torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            for pictures in zip(*batch, strict=True)
        )
        with torch.inference_mode():
            flows = network(before, after)[-1].permute(0, 2, 3, 1).float().cpu().numpy()
        yield from map(_frobenius_norm, flows)


@lru_cache(maxsize=1)
def load_raft(weights: str, device: str | None) -> tuple[Any, str]:
    """Torchvision's RAFT with the user's weights, loaded once per process, and its device.

    Raises:
        ValueError: torchvision cannot be imported, the file is not a state dict of raft_large, or the device cannot be
            used.
    """
    import torch

    from imageconductor.devices import choose_device
    from imageconductor.models.weights import read_checkpoint

    try:
        from torchvision.models.optical_flow import raft_large  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch.
        raise ValueError(f"flow=raft needs a torchvision that fits this torch: {error}") from error
    network = raft_large()
    try:
        network.load_state_dict(read_checkpoint(weights))
    except Exception as error:  # A missing file, no state dict, or that of another network.
        raise ValueError(f"raft_weights={weights}: not torchvision's raft_large: {str(error)[:400]}") from error
    device = choose_device(device)
    return network.to(device, torch.float32).eval(), device


def motion_threshold(
    scores: NDArray[np.float64], keys: NDArray[np.bytes_], fraction: float
) -> tuple[float, str] | None:
    """The highest (score, key) among the `fraction` of all clips with the least motion; None if that is no clip.

    Clips up to it are dropped; among equal scores the key decides. The number of dropped clips is rounded down. The
    threshold is a quantile over the whole data set, so it is computed once all scores are known.
    """
    count = int(len(scores) * fraction)
    if not count:
        return None
    last = np.lexsort((keys, scores))[count - 1]
    return float(scores[last]), bytes(keys[last]).decode()
