"""What is shown while a video is made: steps, time left, and pictures of the current estimates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from imageconductor.sampling.video import Frames, to_uint8

BRANCHES = ("undrawn", "camera", "object", "mixed")
"""Estimates of the mixing board: without the drawing, and under each set of LoRAs."""


@dataclass(frozen=True)
class Waiting:
    """Requests are worked on before this one, `ahead` of them; 0 = it begins, and no step has ended yet."""

    ahead: int


@dataclass(frozen=True)
class Step:
    """A denoising step has ended.

    Attributes:
        done: Steps so far.
        total: Steps of this request.
        seconds_left: Estimated from the steps so far; None before the first one.
        estimates: (K, H, W, 3) uint8, frames of the current estimate x_0 for the seed of each video; none at steps
            without.
        branches: (K, H, W, 3) for each of `BRANCHES`, of the first video; none without the mixing board.
    """

    done: int
    total: int
    seconds_left: float | None = None
    estimates: dict[int, Frames] = field(default_factory=dict)
    branches: dict[str, Frames] = field(default_factory=dict)


class Mix:
    """Weights of the mixing board, which a visitor moves while a worker reads them."""

    def __init__(self, camera: float = 0.0, object: float = 0.0, mixed: float = 0.0):
        self._lock = threading.Lock()
        self._weights = {"camera": camera, "object": object, "mixed": mixed}

    def read(self) -> dict[str, float]:
        """The weights of the camera's, the object's and the mixed branch."""
        with self._lock:
            return dict(self._weights)

    def as_tuple(self) -> tuple[float, float, float]:
        """The weights in the order of `SampleJob.mix`."""
        weights = self.read()
        return weights["camera"], weights["object"], weights["mixed"]

    def set(self, **weights: float) -> None:
        """Changes some of the weights, which act from the next step on."""
        with self._lock:
            new = {**self._weights, **weights}
            if new.keys() != self._weights.keys():
                raise ValueError(f"weights of the mixing board are {', '.join(self._weights)}, got {list(weights)}")
            self._weights = new


class StepReport:
    """The pipeline's `callback_on_step_end`: reports each step, and stops or mixes as the request says by then.

    Args:
        report: Takes each `Step`.
        is_stopped: Read at each step.
        seeds: Of the videos.
        mix: Of the mixing board; None = without it.
        begun_with: Its weights in the first step.
        every: Decode estimates at every n-th step; 0 = never.
        num_frames: Frames decoded of each estimate, from first to last.

    Attributes:
        has_moved: Whether a step was made with other weights of the mixing board than the first one.
    """

    def __init__(
        self,
        report: Callable[[Step], None],
        is_stopped: Callable[[], bool],
        seeds: Sequence[int],
        mix: Mix | None = None,
        begun_with: Mapping[str, float] | None = None,
        every: int = 1,
        num_frames: int = 4,
    ):
        self.report, self.is_stopped, self.seeds, self.mix = report, is_stopped, seeds, mix
        self.every, self.num_frames = every, num_frames
        self.has_moved = False
        self._weights = begun_with
        self._began = time.monotonic()
        self._steps = 0

    @property
    def tensor_names(self) -> list[str]:
        """Tensors that the pipeline is to hand over."""
        names = ["x_0"] if self.every else []
        return names + (["branch_x_0"] if self.mix is not None else [])

    def __call__(self, pipe: Any, step: int, _t: Tensor, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Reports the step; gives back nothing that would change the latents."""
        self._steps += 1
        if self.is_stopped():
            pipe._interrupt = True
            return {}
        total = pipe.num_timesteps * pipe.num_windows
        done = pipe.window * pipe.num_timesteps + step + 1
        per_step = (time.monotonic() - self._began) / self._steps
        estimates: dict[int, Frames] = {}
        branches: dict[str, Frames] = {}
        if self.every and "x_0" in tensors and self._steps % self.every == 0 and done < total:
            latents = tensors["x_0"].split(1)
            estimates = {seed: self._decode(pipe, one) for seed, one in zip(self.seeds, latents, strict=True)}
        if self.mix is not None:
            found = tensors.get("branch_x_0") or {}
            branches = {name: self._decode(pipe, found[name][:1]) for name in BRANCHES if name in found}
            pipe._mix = self.mix.read()
            self.has_moved |= done < total and pipe._mix != self._weights
        self.report(Step(done, total, per_step * (total - done), estimates, branches))
        return {}

    def _decode(self, pipe: Any, x_0: Tensor) -> Frames:
        """(K, H, W, 3) of a video's estimate (1, C, T, h, w): K frames from first to last."""
        frames = np.unique(np.linspace(0, x_0.shape[2] - 1, min(self.num_frames, x_0.shape[2])).round().astype(int))
        decoded = pipe.decode_latents(x_0[:, :, frames.tolist()])[0]
        return to_uint8(decoded.permute(0, 2, 3, 1).float().cpu().numpy())
