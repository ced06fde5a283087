"""When a run ends before its last step: its minutes are over, or a signal asks it to end."""

from __future__ import annotations

import logging
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
_AGREED_EVERY = 10  # steps, at most, between two times that several processes ask each other


class Stop:
    """Tells every process of a run the same about whether it has to end; its minutes begin here.

    Inside the block SIGTERM and SIGUSR1, which a queue sends before it takes the machine away, no longer kill the
    process but ask the run to end.

    Args:
        max_minutes: That the run may take; None = no limit.
        log_every: Steps between two times that several processes wait for each other anyway.
    """

    def __init__(self, max_minutes: float | None, log_every: int = 1):
        self.every = min(log_every, _AGREED_EVERY)
        self.end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
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
        """Whether the run has to end after so many steps; several processes agree on it every few steps."""
        is_due = self.signal is not None or (self.end is not None and time.monotonic() >= self.end)
        processes = PartialState()
        if processes.num_processes > 1:
            if step % self.every:
                return False
            is_due = cast(Tensor, reduce(torch.tensor(float(is_due), device=processes.device), "sum")).item() > 0
        if is_due and self.signal is not None:
            logger.warning("%s: the run ends after step %d", signal.Signals(self.signal).name, step)
        return is_due

    def _ask(self, number: int, _: object) -> None:
        self.signal = number


def spare_worker(_: int) -> None:
    """Lets a process that prepares batches outlive a queue's signals, for the steps that are left.

    A second SIGTERM ends it, as the training process itself may send one to a worker that does not end.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)


def _ignore_once(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_DFL)
