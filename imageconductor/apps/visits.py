"""What belongs to one visitor: a folder, the request on its way, and the results so far."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from imageconductor.apps.engine import Made, Ticket
from imageconductor.apps.limits import FieldError, Limits
from imageconductor.apps.progress import Mix
from imageconductor.apps.results import Result, store


class Visit:
    """One open page, or one client of the HTTP API.

    Attributes:
        folder: For the visitor's drawings and results; nobody else's files are in it.
        mix: Weights of the mixing board as its sliders stand.
    """

    def __init__(self, folder: Path, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self.folder, self.limits, self._clock = folder, limits, clock
        self.mix = Mix()
        self._lock = threading.Lock()
        self._results: dict[int, Result] = {}
        self._made = 0
        self._tickets: list[Ticket] = []
        self.last_seen = self._clock()

    @property
    def is_busy(self) -> bool:
        """Whether a request is on its way."""
        with self._lock:
            return bool(self._tickets)

    @property
    def results(self) -> list[Result]:
        """The latest first."""
        with self._lock:
            return list(self._results.values())[::-1]

    def result(self, number: int | None, field: str = "result") -> Result:
        """The result of that number.

        Raises:
            FieldError: There is none; older ones have been deleted.
        """
        with self._lock:
            found = self._results.get(number or 0)
        if found is None:
            raise FieldError(field, "this video is no longer kept; make it again" if number else "make a video first")
        return found

    def begin(self, ticket: Ticket) -> None:
        """Notes a request, so that `stop` reaches it."""
        with self._lock:
            self._tickets.append(ticket)
        self.last_seen = self._clock()

    def end(self, ticket: Ticket) -> None:
        """Forgets a request that is done."""
        with self._lock:
            self._tickets.remove(ticket)
        self.last_seen = self._clock()

    def stop(self) -> int:
        """Stops this visitor's requests, and gives their number."""
        with self._lock:
            tickets = list(self._tickets)
        for ticket in tickets:
            ticket.stop()
        return len(tickets)

    def keep(self, made: Made, note: str = "", drawing: dict | None = None, cropped: Sequence[str] = ()) -> Result:
        """Stores a finished request among the results; the oldest one beyond the limit is deleted."""
        with self._lock:
            self._made += 1
            number = self._made
        result = store(made, number, self.folder / f"result-{number}", note, drawing, cropped)
        with self._lock:
            self._results[number] = result
            surplus = [self._results.pop(old) for old in list(self._results)[: -self.limits.results]]
        for old in surplus:
            old.remove()
        self.last_seen = self._clock()
        return result

    def close(self) -> None:
        """Stops what runs and deletes the visitor's files."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class Visits:
    """The visits of one page, by the key that the browser's session has.

    Args:
        root: Folder of the visitors' folders.
        limits: How long a visit and how many results are kept.
        clock: Seconds, for the tests.
    """

    def __init__(self, root: Path, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self._root, self._limits, self._clock = root, limits, clock
        self._visits: dict[str, Visit] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def watch(self, seconds: float) -> None:
        """Calls `forget_old` every so many seconds until `close`, so that files go even if no visitor comes."""

        def look() -> None:
            while not self._closed.wait(seconds):
                self.forget_old()

        threading.Thread(target=look, name="visits", daemon=True).start()

    def find(self, key: str | None) -> Visit:
        """The visit of a session, which begins with the first call."""
        if not key:
            raise ValueError("a request without a session")
        self.forget_old()
        with self._lock:
            if key not in self._visits:
                folder = Path(tempfile.mkdtemp(prefix="visit-", dir=self._root))
                self._visits[key] = Visit(folder, self._limits, self._clock)
            visit = self._visits[key]
            visit.last_seen = self._clock()
            idle = [(other.last_seen, name) for name, other in self._visits.items() if not other.is_busy]
            too_many = max(0, len(self._visits) - self._limits.visits)
            surplus = [self._visits.pop(name) for _, name in sorted(idle)[:too_many]]
        for other in surplus:
            other.close()
        return visit

    def leave(self, key: str | None) -> None:
        """The page of a session is closed: what it asked for is not needed any more; its results stay for a while."""
        with self._lock:
            visit = self._visits.get(key or "")
        if visit is not None:
            visit.stop()

    def forget_old(self) -> None:
        """Deletes the files of visitors who have not been seen for a while."""
        before = self._clock() - self._limits.visit_seconds
        with self._lock:
            old = [key for key, visit in self._visits.items() if visit.last_seen < before and not visit.is_busy]
            visits = [self._visits.pop(key) for key in old]
        for visit in visits:
            visit.close()

    def __len__(self) -> int:
        return len(self._visits)

    def close(self) -> None:
        """Ends all visits."""
        self._closed.set()
        with self._lock:
            visits = list(self._visits.values())
            self._visits.clear()
        for visit in visits:
            visit.close()
