"""The I3D of FVD as a network of its real architecture, with random weights in its real file format.

Inception-v1 with all kernels inflated to three dimensions, after Carreira and Zisserman, 2017, figure 3; widths of the
modules after Szegedy et al., 2014, table 1. The forward takes the arguments of the TorchScript file that FVD is usually
computed with.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

MODULES = (  # 1x1; 1x1 before 3x3, 3x3; 1x1 before the second 3x3, the second 3x3; 1x1 after the pool
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


def pad_same(x: torch.Tensor, kernel: list[int], stride: list[int]) -> torch.Tensor:
    """TensorFlow's padding "SAME": outputs are sides divided by strides, rounded up; the odd one out goes behind."""
    pads: list[int] = []
    for side, width, step in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):  # noqa: B905 - TorchScript knows no strict
        total = max(0, ((side + step - 1) // step - 1) * step + width - side)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.kernel, self.stride = [kernel] * 3, [stride] * 3
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=0.001)
        nn.init.kaiming_normal_(self.conv3d.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv3d(pad_same(x, self.kernel, self.stride))))


class Pool(nn.Module):
    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = list(kernel), list(stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Module(nn.Module):
    def __init__(self, inputs: int, widths: list[int]):
        super().__init__()
        one, before, three, before_second, second, pooled = widths
        self.b0 = Unit(inputs, one)
        self.b1a, self.b1b = Unit(inputs, before), Unit(before, three, 3)
        self.b2a, self.b2b = Unit(inputs, before_second), Unit(before_second, second, 3)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(inputs, pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


class InceptionI3d(nn.Module):
    """I3D on RGB with the 400 classes of Kinetics.

    Args:
        divisor: Of all widths; 1 = full size, 12.7 million parameters.
    """

    def __init__(self, divisor: int = 1):
        super().__init__()
        first, second = 64 // divisor, 192 // divisor
        layers: list[nn.Module] = [Unit(3, first, 7, 2), Pool((1, 3, 3), (1, 2, 2))]
        layers += [Unit(first, first), Unit(first, second, 3), Pool((1, 3, 3), (1, 2, 2))]
        channels = second
        for number, group in enumerate(MODULES):
            for widths in group:
                narrow = [width // divisor for width in widths]
                layers.append(Module(channels, narrow))
                channels = narrow[0] + narrow[2] + narrow[4] + narrow[5]
            if number < 2:
                layers.append(Pool(((3, 3, 3), (2, 2, 2))[number], (2, 2, 2)))
        self.layers = nn.Sequential(*layers)
        self.logits = nn.Conv3d(channels, 400, 1)

    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> torch.Tensor:
        """(B, 3, T, H, W) to (B, 400): logits as features, else probabilities."""
        if resize:
            size = [x.shape[2], 224, 224]
            x = F.interpolate(x, size=size, mode="trilinear", align_corners=False)
        if rescale:
            x = 2 * x / 255 - 1
        x = F.avg_pool3d(self.layers(x), [2, 7, 7], [1, 1, 1])
        logits = self.logits(x).squeeze(4).squeeze(3).mean(dim=2)
        return logits if return_features else logits.softmax(dim=1)


def write_i3d(path: Path, divisor: int = 1) -> InceptionI3d:
    """Writes the network, with the same random weights each time, as TorchScript; returns it."""
    torch.manual_seed(0)
    network = InceptionI3d(divisor).eval()
    torch.jit.script(network).save(str(path))
    return network
