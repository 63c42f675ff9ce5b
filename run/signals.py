"""How the system, a scheduler or the user stops a run."""

import os
import signal
from types import FrameType


class StopSignal:
    """The first signal received that is to stop the run after its step, or None.

    SIGTERM, SIGUSR1, SIGHUP and Ctrl-C do. A second Ctrl-C quits at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._interrupted = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            under_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not under_nohup:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(130)
            self._interrupted = True
        self.received = self.received or number
