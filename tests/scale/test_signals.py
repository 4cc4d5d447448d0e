"""What a training loop is told of signals."""

import os
import signal

import pytest

from dblocks.__main__ import main
from dblocks.scale import Stop


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C raises, also where whoever started the tests has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_is_noted_and_the_second_one_acts():
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_others_are_left_alone(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    monkeypatch.setattr("dblocks.__main__._run", lambda argv: seen.append(handler()) or 0)
    handler = lambda: signal.getsignal(signal.SIGTERM)
    try:
        for own in (signal.SIG_IGN, lambda *_: None, signal.SIG_DFL):
            signal.signal(signal.SIGTERM, own)
            main([])
            assert handler() == own
            assert (seen[-1] == own) == (own != signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGTERM, before)
