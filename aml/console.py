"""A long-running command and its surroundings: requests to stop, and whether a person watches."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any


class StopSignals:
    """SIGINT and SIGTERM set `received` instead of ending the process; a second one ends it."""

    def __enter__(self) -> StopSignals:
        self.received = 0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        print("\nsaving, then leaving; once more to leave at once", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether progress bars make sense."""
    return sys.stderr.isatty() and "SLURM_JOB_ID" not in os.environ
