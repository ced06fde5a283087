"""When a run ends before its last step: its minutes are over, or a signal asks it to end."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

logger = logging.getLogger(__name__)

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_PATIENCE_S = 2.0  # within which a worker takes signals for one and the same


class Stop:
    """Tells every process of a run the same about whether it has to end.

    Inside the block SIGTERM and SIGUSR1, which a queue sends before it takes the machine away, no longer kill the
    process but ask the run to end.

    Args:
        max_minutes: That the run may take; None = no limit.
        start: When its minutes begin, by `time.monotonic()`; None = now.
        begun: Steps that were done before. However long loading has taken, one more is done: a queue that starts the
            run again and again gets ahead.
    """

    def __init__(self, max_minutes: float | None, start: float | None = None, begun: int = 0):
        start = time.monotonic() if start is None else start
        self.begun = begun
        self.end = None if max_minutes is None else start + 60 * max_minutes
        self.signal: int | None = None
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # No other may set them.
            self.handlers = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def is_due(self, step: int) -> bool:
        """Whether the run has to end after so many steps; several processes ask each other."""
        is_over = self.end is not None and time.monotonic() >= self.end and step > self.begun
        is_due = self.signal is not None or is_over
        processes = PartialState()
        if processes.num_processes > 1:
            is_due = cast(Tensor, reduce(torch.tensor(float(is_due), device=processes.device), "sum")).item() > 0
        if is_due and self.signal is not None:
            logger.warning("%s: the run ends after step %d", signal.Signals(self.signal).name, step)
        return is_due

    def breaks_step(self) -> bool:
        """Whether a step is given up between its micro-steps, which may take longer than a queue waits.

        One process can do so by itself; several would have to wait for each other at each micro-step.
        """
        return self.signal is not None and PartialState().num_processes == 1

    def _ask(self, number: int, _: object) -> None:
        self.signal = number


def spare_worker(_: int) -> None:
    """Lets a process that prepares batches outlive a queue's signals, for the steps that are left.

    A SIGTERM that comes later ends it, as the training process itself may send one to a worker that does not end. One
    that comes at once is the same again: a queue may send it to every process, and a launcher hand it on.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    first: list[float] = []

    def spare(number: int, _: object) -> None:
        first.append(time.monotonic())
        if first[-1] - first[0] > _PATIENCE_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, spare)
