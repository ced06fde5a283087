"""A small patch discriminator, by which a decoder learns that edges are sharp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Tells frames from decoded ones, patch by patch (26 pixels wide), and learns along with the decoder.

    Args:
        learning_rate: Of its own Adam.
        seed: Of its random weights.

    Source: hinge losses and the adaptive weight of VQGAN (Esser et al., 2021), with spectral norm.
    """

    def __init__(self, learning_rate: float, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for width, (narrow, wide) in ((4, (3, 32)), (4, (32, 64)), (3, (64, 64))):
                layers += [spectral_norm(nn.Conv2d(narrow, wide, width, width // 2, 1)), nn.LeakyReLU(0.2)]
            self.network = nn.Sequential(*layers, spectral_norm(nn.Conv2d(64, 1, 3, padding=1)))
        self.optimizer = torch.optim.AdamW(self.parameters(), learning_rate, betas=(0.5, 0.9), weight_decay=0.0)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits (B, 1, h, w), higher where frames (B, 3, H, W) in [-1, 1] look real."""
        return self.network(frames)

    def decoder_loss(self, decoded: Tensor, reconstruction: Tensor, weight: Tensor) -> Tensor:
        """What decoded frames lack in realism, scaled so that its gradient is as long as the reconstruction's.

        Args:
            decoded: (B, 3, H, W).
            reconstruction: (), the loss beside it.
            weight: Of the decoder's last layer, at which the gradients are compared.
        """
        loss = -self(decoded).mean()
        lengths = [torch.autograd.grad(x, weight, retain_graph=True)[0].norm() for x in (reconstruction, loss)]
        return loss * (lengths[0] / (lengths[1] + 1e-8)).clamp(max=1e4)

    def learn(self, frames: Tensor, decoded: Tensor) -> None:
        """One step on frames and on decoded ones, both (B, 3, H, W)."""
        self.optimizer.zero_grad()
        loss = F.relu(1 - self(frames)).mean() + F.relu(1 + self(decoded.detach())).mean()
        loss.backward()
        self.optimizer.step()
