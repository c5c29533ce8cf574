"""Being asked to stop: what SIGINT (Ctrl-C) and SIGTERM (a scheduler, a shutdown) do to a training run.

While a run is prepared, a signal ends the process at once: all that it writes by then is whole or absent. While it
trains, the first signal lets it finish the step and save, and the second one ends it at once. That is safe too, as a
checkpoint is seen only when it is complete.
"""

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class StoppedError(Exception):
    """Work that can be done again later was given up, because the run is asked to stop."""


class Stop:
    """Whether a run is asked to stop. True from the first signal on that came while it was patient."""

    def __init__(self) -> None:
        self.number = 0
        self._is_patient = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.number != 0

    def listen(self, number: int) -> None:
        """Hear the signal ``number`` from now on. Raises ValueError outside of the main thread."""
        self._before[number] = signal.signal(number, self._notice)

    def leave(self) -> None:
        """Give all signals back to those who heard them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Let the first signal in the block wait for whoever asks this object, instead of ending the process."""
        self._is_patient = True
        try:
            yield
        finally:
            self._is_patient = False

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self._is_patient and not self.number:
            self.number = number
        elif callable(self._before[number]):
            self._before[number](number, frame)
        else:
            sys.exit(128 + number)

    def watching(self, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items``, until the run is asked to stop: then raise StoppedError."""
        for item in items:
            yield item
            if self:
                raise StoppedError


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Yield a Stop that hears SIGINT and SIGTERM while the block runs.

    In another thread than the main one it hears nothing: whoever started the thread handles signals.
    """
    stop = Stop()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not in the main thread
                stop.listen(number)
        yield stop
    finally:
        stop.leave()
