"""How the system, a scheduler or the user stops a run."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

# Those of them that the system knows: Windows has neither SIGUSR1 nor SIGHUP.
STOPS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
    if hasattr(signal, name)
]


class Stopped(BaseException):
    """A signal that came where there was nothing to finish."""


class StopSignal:
    """The first signal received that is to stop the run after its step, or None.

    SIGTERM, SIGUSR1, SIGHUP and Ctrl-C do. A second Ctrl-C quits at once.
    """

    def __init__(self, alone: bool = True) -> None:
        """alone: this is the only process, which need not agree with others when to stop."""
        self.received: int | None = None
        self._alone, self._waits, self._interrupted = alone, False, False
        hangup = getattr(signal, "SIGHUP", None)
        for number in STOPS:
            under_nohup = number == hangup and signal.getsignal(number) == signal.SIG_IGN
            if not under_nohup:
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, where a process alone waits for data, a signal does not wait: Stopped."""
        try:
            self._waits = self._alone
            if self._waits and self.received:
                raise Stopped
            yield
        finally:
            self._waits = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(130)
            self._interrupted = True
        self.received = self.received or number
        if self._waits:
            self._waits = False
            raise Stopped
