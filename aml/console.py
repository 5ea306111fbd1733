"""A command and its surroundings: requests to stop, whether a person watches, and whether anybody still reads."""

from __future__ import annotations

import contextlib
import os
import select
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
        with contextlib.suppress(BrokenPipeError):  # or it would end what is to be saved
            print("\nsaving, then leaving; once more to leave at once", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether progress bars make sense."""
    return sys.stderr.isatty() and "SLURM_JOB_ID" not in os.environ


def reader_has_left() -> bool:
    """Whether nobody reads stdout or stderr any more, as after `| head`; what is printed there then goes nowhere.

    A BrokenPipeError with readers left came from elsewhere.
    """
    left = False
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError):  # closed from the start, or no file
            continue
        pipe = select.poll()
        pipe.register(descriptor, 0)  # errors are always reported
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            left = True
    return left
