"""Exponential moving average of the weights that learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from imageconductor.training import sharding


class WeightAverage:
    """The average of a run, or nothing at all where there is no decay.

    Args:
        parameters: What learns, by name.
        decay: Of the average; None = no average. It rises to that from 0, which keeps the random start out of the
            average of a short run.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float | None):
        self.parameters = parameters
        self.model: EMAModel | None = None
        if decay is not None:
            warm_up = {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
            self.model = EMAModel(list(parameters.values()), decay=decay, **warm_up)

    def update(self) -> None:
        """Takes in the weights as they are now."""
        if self.model is not None:
            self.model.step(self.parameters.values())

    def named(self) -> dict[str, Tensor]:
        """The average by name; empty without one."""
        return {} if self.model is None else dict(zip(self.parameters, self.model.shadow_params, strict=True))

    def load(self, saved: Mapping[str, Tensor], step: int) -> None:
        """Puts back an average, or begins one from weights, that were saved whole after `step` steps."""
        if self.model is not None:
            for name, value in self.named().items():
                value.copy_(sharding.split_like(saved[name], value))
            self.model.optimization_step = step

    def copy_to_weights(self) -> None:
        """Replaces the weights by their average, if there is one."""
        if self.model is not None:
            self.model.copy_to(self.parameters.values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the weights are their average."""
        if self.model is None:
            yield
            return
        self.model.store(self.parameters.values())
        self.copy_to_weights()
        try:
            yield
        finally:
            self.model.restore(self.parameters.values())
