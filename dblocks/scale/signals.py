"""Ctrl-C and SIGTERM as a wish that the training loop reads between two steps."""

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
        self.code = 128 + received  # as shells have it: 130 of Ctrl-C, 143 of SIGTERM


class Terminated(BaseException):
    """SIGTERM came; like KeyboardInterrupt it is no error that code would handle."""

    code = 128 + signal.SIGTERM


@contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises `Terminated`, so that what is being written is cleaned up.

    In the main thread, and where nobody else handles or ignores the signal.
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
    """Within the `with` block the first Ctrl-C or SIGTERM is noted in `received`, no more.

    The second one acts as without. Python hands signals to the main thread: in others this does
    nothing.
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
