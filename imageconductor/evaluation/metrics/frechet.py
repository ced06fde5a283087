"""Fréchet distances between sets of videos: FID over their frames, FVD over whole clips (section C.2).

The distance is torchmetrics'; networks and preprocessing are ours, since published figures differ by them:

| name | network | frames or clips | preprocessing |
|---|---|---|---|
| `fid` | Inception-v3, pytorch-fid's weights, pool3 | each frame | 299 x 299 bilinear, [-1, 1] |
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from imageconductor.devices import choose_device
from imageconductor.evaluation.metrics.inception import Inception
from imageconductor.files import atomic_path

_I3D_SOURCE = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt (StyleGAN-V's port)"
_BATCH_SIZE = 16
_RESIZE = {"fid": "bilinear to 299 x 299", "fvd": "bilinear to 224 x 224", "frechet_small": "none"}


@dataclass(frozen=True)
class FrechetDistance:
    """A Fréchet distance and all that it depends on.

    Attributes:
        name: `fid`, `fvd` or `frechet_small`.
        value: The distance, 0 for equal sets.
        num_generated, num_reference: Size of each set, in frames for `fid`, else in clips.
        weights: File of the network; empty for `frechet_small`.
        resize: Interpolation and size to which frames were resized.
        num_frames: The first frames of each video, so many, were used.
    """

    name: str
    value: float
    num_generated: int
    num_reference: int
    weights: str
    resize: str
    num_frames: int


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
            raise ValueError(f"{path} is no TorchScript file: {' '.join(str(error).split())[:200]}") from error
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


@dataclass(frozen=True)
class Statistics:
    """Sums over the features of a set, of which its mean and covariance are made.

    Attributes:
        count: Samples: frames for `fid`, else clips.
        total: (D,) float64, sum of the features.
        products: (D, D) float64, sum of their outer products.
    """

    count: int
    total: Tensor
    products: Tensor

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of both sets together."""
        return Statistics(self.count + other.count, self.total + other.total, self.products + other.products)

    def save(self, path: Path) -> None:
        """Writes the statistics as safetensors."""
        with atomic_path(path) as temporary:
            save_file({"count": torch.tensor(self.count), "total": self.total, "products": self.products}, temporary)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Statistics that `save` wrote."""
        state = load_file(path)
        return cls(int(state["count"]), state["total"], state["products"])


def load_network(name: str, weights: Path | None = None) -> nn.Module:
    """The network of a Fréchet distance, on the CPU, from frames (`fid`) or clips in [0, 1] to features.

    Raises:
        FileNotFoundError: There are no weights; the message says where to get them.
        ValueError: The name is none of the distances, or the file holds something else.
    """
    if name not in _RESIZE:
        raise ValueError(f"name must be fid, fvd or frechet_small, got {name!r}")
    if name == "frechet_small":
        return SmallExtractor()
    if weights is None:
        raise FileNotFoundError(f"{name} needs the weights of its network, a file you have downloaded")
    return Inception.load(Path(weights)) if name == "fid" else I3D(Path(weights))


def collect_statistics(
    name: str,
    videos: Iterable[NDArray[np.uint8]],
    weights: Path | None = None,
    num_frames: int = 16,
    device: str | None = None,
) -> Statistics:
    """Statistics of a set of videos, which are read one at a time.

    Args:
        name: `fid`, `fvd` or `frechet_small`.
        videos: Each (T, H, W, 3), T at least num_frames.
        weights: File of the network's weights; not needed for `frechet_small`.
        num_frames: Frames to use of each video, the first ones.
        device: Device of the network; None = cuda where there is one.

    Raises:
        FileNotFoundError: There are no weights; the message says where to get them.
        ValueError: The name is another one, a video is too short, or the device cannot be used.
    """
    network = load_network(name, weights)
    device = choose_device(device)
    if device.startswith("mps"):  # which has no float64 for the sums
        device = "cpu"
    metric = _build_metric(network).to(device)
    for video in videos:
        frames = _select_frames(video, num_frames)
        clip = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 255
        samples = clip if name == "fid" else clip.transpose(0, 1)[None]
        for batch in samples.split(_BATCH_SIZE):
            metric.update(batch, real=True)
    sums = (metric.real_features_sum, metric.real_features_cov_sum)
    return Statistics(int(metric.real_features_num_samples), *(value.cpu() for value in sums))


def frechet_distance(
    name: str,
    generated: Statistics,
    reference: Statistics,
    weights: Path | None = None,
    num_frames: int = 16,
) -> FrechetDistance:
    """Fréchet distance between two sets by their statistics.

    Args:
        name: As for `collect_statistics`.
        generated: Of the videos that are judged.
        reference: Of the videos to compare with.
        weights: As for `collect_statistics`, for the record.
        num_frames: As for `collect_statistics`, for the record.

    Raises:
        ValueError: A set has fewer than two samples.
    """
    for kind, statistics in (("reference", reference), ("generated", generated)):
        if statistics.count < 2:
            raise ValueError(f"{name} needs at least two samples in each set, the {kind} one has {statistics.count}")
    metric = _build_metric(_Identity(len(reference.total)))
    metric.orig_dtype = torch.float64
    for prefix, statistics in (("real", reference), ("fake", generated)):
        setattr(metric, f"{prefix}_features_num_samples", torch.tensor(statistics.count))
        setattr(metric, f"{prefix}_features_sum", statistics.total)
        setattr(metric, f"{prefix}_features_cov_sum", statistics.products)
    metric._update_count = 1  # It would warn that nothing was given to it.
    used = "" if name == "frechet_small" else str(weights or "")
    counts = (generated.count, reference.count)
    value = max(0.0, float(metric.compute()))  # Rounding takes that of equal sets below zero.
    return FrechetDistance(name, value, *counts, used, _RESIZE[name], num_frames)


def _select_frames(video: NDArray[np.uint8], num_frames: int) -> NDArray[np.uint8]:
    if video.ndim != 4 or video.shape[-1] != 3 or len(video) < num_frames:
        raise ValueError(f"a video of shape {video.shape} has not the {num_frames} frames that are needed")
    return np.ascontiguousarray(video[:num_frames])


class _Identity(nn.Module):
    """Stands in for the network where there are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _build_metric(network: nn.Module) -> Any:
    """Torchmetrics' distance over a network, which stays in its own precision; sums are kept in float64."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ValueError("Fréchet distances need torchmetrics: pip install -e '.[metrics]'") from error
    return FrechetInceptionDistance(feature=network, normalize=True, sync_on_compute=False)
