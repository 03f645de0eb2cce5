"""A signal that stops a run: it ends a wait for clients, and never a round that is being closed."""

from __future__ import annotations

import signal
import threading

import pytest

from fedraclora.engines.deploy.stopping import SIGNALS, StopSignals
from fedraclora.errors import StoppedError


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_wait_at_once(number: signal.Signals) -> None:
    stops, before = StopSignals(), signal.getsignal(number)
    with pytest.raises(StoppedError), stops.handled(), stops.waiting():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_a_signal_elsewhere_is_kept_until_the_next_wait() -> None:
    stops, done = StopSignals(), list[str]()

    def run() -> None:
        with stops.handled():
            with stops.waiting():
                done.append("waited")
            signal.raise_signal(signal.SIGINT)
            done.append("closed")
            with stops.waiting():
                done.append("waited again")

    with pytest.raises(StoppedError):
        run()
    assert done == ["waited", "closed"]


def test_a_second_signal_is_not_kept() -> None:
    """Who asks twice does not wait for the end of a round."""
    with StopSignals().handled():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    before, found = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with StopSignals().handled():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
