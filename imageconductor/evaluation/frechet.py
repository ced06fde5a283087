"""Fréchet distances between sets of videos: FID over their frames, FVD over whole clips (section C.2).

The distance is torchmetrics'; networks and preprocessing are ours, since published figures differ by them:

| name | network | frames or clips | preprocessing |
|---|---|---|---|
| `fid` | Inception-v3, pytorch-fid's weights, pool3 | each frame, every `stride`-th | 299 x 299 bilinear, [-1, 1] |
| `fvd` | I3D on Kinetics-400 as TorchScript, the logits | the first `num_frames` | 224 x 224 bilinear, [-1, 1] |
| `frechet_small` | fixed random convolutions of ours | as `fvd` | none |

`frechet_small` needs no weights. It tells gross failures on small videos from lesser ones, is comparable to nothing
published, and is never called FID or FVD.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from imageconductor.evaluation.inception import Inception

_I3D_SOURCE = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt (StyleGAN-V's port)"
_BATCH_SIZE = 16


@dataclass(frozen=True)
class FrechetDistance:
    """A Fréchet distance and all that it depends on.

    Attributes:
        name: `fid`, `fvd` or `frechet_small`.
        value: The distance, 0 for equal sets.
        num_generated, num_reference: Size of each set, in frames for `fid`, else in clips.
        weights: File of the network; empty for `frechet_small`.
        resize: Interpolation and size to which frames were resized.
        num_frames, stride: Every `stride`-th frame of each video was used, `num_frames` in all.
    """

    name: str
    value: float
    num_generated: int
    num_reference: int
    weights: str
    resize: str
    num_frames: int
    stride: int


class I3D(nn.Module):
    """A TorchScript I3D: clips (B, 3, T, H, W) in [0, 1] to features (B, 400).

    Args:
        path: StyleGAN-V's port, whose forward takes `rescale`, `resize` and `return_features`, or one that takes the
            clip alone.

    Raises:
        FileNotFoundError: There is no file; the message says where to get it.
        ValueError: The file is no TorchScript.
    """

    num_features = 400

    def __init__(self, path: Path):
        super().__init__()
        if not path.is_file():
            raise FileNotFoundError(f"no I3D at {path}; get it from {_I3D_SOURCE}")
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is no TorchScript file: {str(error)[:200]}") from error
        names = {argument.name for argument in self.network.forward.schema.arguments}
        options = {"rescale": False, "resize": False, "return_features": True}
        self.options = {name: value for name, value in options.items() if name in names}

    def forward(self, clips: Tensor) -> Tensor:
        """Features of clips (B, 3, T, H, W) in [0, 1]."""
        frames = clips.transpose(1, 2)
        size = frames.shape[:2]
        frames = F.interpolate(frames.flatten(0, 1), (224, 224), mode="bilinear", align_corners=False)
        return self.network(frames.unflatten(0, size).transpose(1, 2) * 2 - 1, **self.options)


class SmallExtractor(nn.Module):
    """Random convolutions over space and time, the same in every process: clips (B, 3, T, H, W) to (B, 64)."""

    num_features = 64

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        widths = (3, 16, 32, 64)
        self.weights = [
            torch.randn(after, before, 3, 3, 3, generator=generator) / (before * 27) ** 0.5
            for before, after in itertools.pairwise(widths)
        ]

    def forward(self, clips: Tensor) -> Tensor:
        """Features of clips (B, 3, T, H, W) in [0, 1]."""
        for weight in self.weights:
            clips = F.relu(F.conv3d(clips, weight.to(clips), stride=(1, 2, 2), padding=1))
        return clips.mean(dim=(2, 3, 4))


def frechet_distance(
    name: str,
    generated: Iterable[NDArray[np.uint8]],
    reference: Iterable[NDArray[np.uint8]],
    weights: Path | None = None,
    num_frames: int = 16,
    stride: int = 1,
    device: str | None = None,
) -> FrechetDistance:
    """Fréchet distance between two sets of videos, which are read one at a time.

    Args:
        name: `fid`, `fvd` or `frechet_small`.
        generated: Videos (T, H, W, 3), T at least (num_frames - 1) * stride + 1.
        reference: Videos to compare with, of the same shapes.
        weights: File of the network's weights; not needed for `frechet_small`.
        num_frames: Frames to use of each video.
        stride: Distance between the frames that are used; 1 = every frame.
        device: Device of the network; None = cuda where there is one.

    Raises:
        FileNotFoundError: There are no weights; the message says where to get them.
        ValueError: The name is another one, a video is too short, or a set has fewer than two samples.
    """
    if name not in ("fid", "fvd", "frechet_small"):
        raise ValueError(f"name must be fid, fvd or frechet_small, got {name!r}")
    if name != "frechet_small" and weights is None:
        raise FileNotFoundError(f"{name} needs the weights of its network, a file you have downloaded")
    path = Path(weights) if weights is not None and name != "frechet_small" else None
    network: Any = Inception.load(path) if name == "fid" and path else I3D(path) if path else SmallExtractor()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    metric = _build_metric(network.to(device), device)
    counts = []
    for videos, is_reference in ((reference, True), (generated, False)):
        count = 0
        for video in videos:
            frames = _select_frames(video, num_frames, stride)
            clip = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 255
            samples = clip if name == "fid" else clip.transpose(0, 1)[None]
            for batch in samples.split(_BATCH_SIZE):
                metric.update(batch, real=is_reference)
                count += len(batch)
        if count < 2:
            kind = "reference" if is_reference else "generated"
            raise ValueError(f"{name} needs at least two samples in each set, the {kind} one has {count}")
        counts.append(count)
    resize = {"fid": "bilinear to 299 x 299", "fvd": "bilinear to 224 x 224", "frechet_small": "none"}[name]
    value = float(metric.compute())
    return FrechetDistance(name, value, counts[1], counts[0], str(path or ""), resize, num_frames, stride)


def _select_frames(video: NDArray[np.uint8], num_frames: int, stride: int) -> NDArray[np.uint8]:
    needed = (num_frames - 1) * stride + 1
    if video.ndim != 4 or video.shape[-1] != 3 or len(video) < needed:
        raise ValueError(f"a video of shape {video.shape} has not the {needed} frames that are needed")
    return np.ascontiguousarray(video[:needed:stride])


def _build_metric(network: nn.Module, device: str) -> Any:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ValueError("Fréchet distances need torchmetrics: pip install -e '.[metrics]'") from error
    # Only the main process of an evaluation computes it, so it must not wait for the others to synchronise.
    metric = FrechetInceptionDistance(feature=network, normalize=True, sync_on_compute=False)
    return metric.set_dtype(torch.float64).to(device)
