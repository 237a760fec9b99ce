"""Signals that ask a run to stop: what is noted, and what is as it was behind it."""

import signal

import pytest
from runs import status_of

from megacl.stopping import StopSignal, ToldToStop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_and_its_handler_is_the_one_before_again(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.received
        signal.raise_signal(number)
        assert stop.received
    assert signal.getsignal(number) is before


def test_where_there_is_nothing_to_save_a_signal_ends_the_block_also_one_that_came_before_it() -> None:
    with StopSignal() as stop:
        with pytest.raises(ToldToStop), stop.at_once():
            signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(ToldToStop), stop.at_once():
            pytest.fail("it was told before")


def test_a_signal_that_is_repeated_does_not_end_a_command_that_is_about_to_end_by_itself() -> None:
    """As a job's script repeats USR1 until the command has ended; __main__ holds it back from its first line on."""
    code = (
        "import signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n"
        "from megacl.stopping import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    signal.raise_signal(signal.SIGUSR1)\n"
        "    assert stop.received\n"
        "signal.raise_signal(signal.SIGUSR1)\n"
        "raise SystemExit(75)\n"
    )
    assert status_of(code) == 75
