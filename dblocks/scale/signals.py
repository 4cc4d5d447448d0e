"""Ctrl-C and SIGTERM as a flag that the training loop reads between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Training ended early, by a signal, after a checkpoint; `code` is the program's exit code."""

    def __init__(self, message: str, received: int) -> None:
        super().__init__(message)
        self.code = 128 + received  # as in shells: 130 for Ctrl-C, 143 for SIGTERM


class Terminated(BaseException):
    """SIGTERM was received; like KeyboardInterrupt, not an `Exception`."""

    code = 128 + signal.SIGTERM


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM raise `Terminated` inside the `with` block, so that writers clean up.

    Only in the main thread, and if no other handler is set and the signal is not ignored.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


class Stop:
    """Inside the `with` block, the first Ctrl-C or SIGTERM only sets `received`.

    The second one has its usual effect. Python delivers signals to the main thread; in other
    threads this class does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            for number in SIGNALS:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()
