"""Batches that are a function of their number, which is what makes a resumed run repeat exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from imageconductor.data.sprites import SpriteDataset, SpriteSet, SpriteWorldConfig


class SpriteBatches(Dataset[dict[str, Any]]):
    """Batch i of an endless sprite world; several sets take turns from batch to batch.

    Args:
        world: Size, frames and seed of the clips; `world.kind` is replaced by the sets.
        sets: Sets to take in turn.
        batch_size: Clips a batch.
    """

    def __init__(self, world: SpriteWorldConfig, sets: Sequence[SpriteSet], batch_size: int):
        self.datasets = [SpriteDataset(replace(world, kind=SpriteSet(kind)), length=2**40) for kind in sets]
        self.batch_size = batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        turn, choice = divmod(index, len(self.datasets))
        return self.datasets[choice].batch(range(turn * self.batch_size, (turn + 1) * self.batch_size))
