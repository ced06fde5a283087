"""What a call may leave out at the price of another video (docs/results.md, "Few steps"); off by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral


@dataclass(frozen=True)
class Shortcuts:
    """Work that is left out in some of the steps.

    Attributes:
        guidance_interval: Part of the steps, from 0 to 1, in which guidance acts; in the others the prompt alone is
            evaluated, under the LoRAs of the control (Kynkaanniemi et al., 2024, for classifier-free guidance).
        controlnet_interval: Steps that share an evaluation of the ControlNets, that of the first of them; 1 = none do.

    Raises:
        ValueError: A value is out of its range.
    """

    guidance_interval: Sequence[float] = (0.0, 1.0)
    controlnet_interval: int = 1

    def __post_init__(self) -> None:
        try:
            start, stop = self.guidance_interval
            is_part = 0 <= start <= stop <= 1
        except (TypeError, ValueError):  # no two of them, or no numbers
            is_part = False
        if not is_part:
            got = self.guidance_interval
            raise ValueError(f"guidance_interval must be two fractions 0 <= START <= STOP <= 1, got {got}")
        if not isinstance(self.controlnet_interval, Integral) or self.controlnet_interval < 1:
            raise ValueError(f"controlnet_interval must be a whole number from 1, got {self.controlnet_interval}")

    def guides(self, step: int, num_steps: int) -> bool:
        """Whether guidance acts in a step; it begins at step / num_steps."""
        start, stop = self.guidance_interval
        return start * num_steps <= step < stop * num_steps

    def reuses(self, step: int) -> bool:
        """Whether a step takes the outputs of the ControlNets from the one before."""
        return step % self.controlnet_interval != 0


NO_SHORTCUTS = Shortcuts()
