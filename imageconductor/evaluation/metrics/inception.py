"""The Inception-v3 of FID, with the weights of pytorch-fid.

The network of Szegedy et al. (2015, "Rethinking the Inception Architecture") with the three differences that the
original FID's TensorFlow graph has: average pools do not count their padding, the last block pools by maximum, and
there are 1008 classes. It is written out here because the libraries that offer it need torchvision, which does not
install beside every torch. Module names are those of the weights file, `pt_inception-2015-12-05-6726825d.pth`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imageconductor.models.weights import read_checkpoint

_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: Any = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    """Block on a 35 x 35 grid."""

    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _Conv(inputs, 48, 1), _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inputs, 64, 1), _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average_pool(x))], 1
        )


class _BlockB(nn.Module):
    """Block that reduces a 35 x 35 grid to 17 x 17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inputs, 64, 1), _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class _BlockC(nn.Module):
    """Block on a 17 x 17 grid; each 7 x 7 kernel is a row and a column."""

    def __init__(self, inner: int):
        super().__init__()
        row: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3)}
        column: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1 = _Conv(768, inner, 1)
        self.branch7x7_2, self.branch7x7_3 = _Conv(inner, inner, **row), _Conv(inner, 192, **column)
        self.branch7x7dbl_1 = _Conv(768, inner, 1)
        self.branch7x7dbl_2, self.branch7x7dbl_3 = _Conv(inner, inner, **column), _Conv(inner, inner, **row)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = _Conv(inner, inner, **column), _Conv(inner, 192, **row)
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average_pool(x))], 1)


class _BlockD(nn.Module):
    """Block that reduces a 17 x 17 grid to 8 x 8."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(768, 192, 1), _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(768, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class _BlockE(nn.Module):
    """Block on an 8 x 8 grid; the network's last one pools by maximum."""

    def __init__(self, inputs: int, pools_by_maximum: bool):
        super().__init__()
        self.pools_by_maximum = pools_by_maximum
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _build_halves()
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inputs, 448, 1), _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _build_halves()
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pools_by_maximum else _average_pool(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


def _build_halves() -> tuple[_Conv, _Conv]:
    return _Conv(384, 384, (1, 3), padding=(0, 1)), _Conv(384, 384, (3, 1), padding=(1, 0))


class Inception(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to pooled features (B, 2048)."""

    num_features = 2048

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = _Conv(3, 32, 3, stride=2), _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Conv(64, 80, 1), _Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _BlockA(192, 32), _BlockA(256, 64), _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _BlockC(128),
            _BlockC(160),
            _BlockC(160),
            _BlockC(192),
        )
        self.Mixed_7a = _BlockD()
        self.Mixed_7b, self.Mixed_7c = _BlockE(1280, pools_by_maximum=False), _BlockE(2048, pools_by_maximum=True)
        self.fc = nn.Linear(2048, 1008)  # The weights file holds it; FID does not use it.

    @classmethod
    def load(cls, path: Path) -> Inception:
        """The network with pytorch-fid's weights.

        Raises:
            FileNotFoundError: There is no file; the message says where to get it.
            ValueError: The file holds other weights.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no Inception weights at {path}; get them from {_URL}")
        try:
            weights = read_checkpoint(path)
            network = cls()
            network.load_state_dict(weights)
        except Exception as error:  # Not a state dict, another one, or a damaged file.
            raise ValueError(
                f"{path} does not hold pytorch-fid's Inception weights: {' '.join(str(error).split())[:200]}"
            ) from error
        return network.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images, which are resized to 299 x 299, bilinear without antialiasing, as the FID does."""
        x = F.interpolate(images, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))
