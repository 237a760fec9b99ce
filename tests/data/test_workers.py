"""Workers: what ends them early ends all of them, also those that are being started."""

import multiprocessing
from multiprocessing.process import BaseProcess

import pytest

from megacl.data.workers import run_on_workers


def build_double():
    return lambda number: 2 * number


def test_results_come_from_as_many_workers_as_are_asked_for():
    assert sorted(run_on_workers(build_double, iter(range(20)), 2)) == list(range(0, 40, 2))


@pytest.mark.parametrize("started", [0, 1])
def test_a_signal_that_comes_while_a_worker_is_started_is_what_the_caller_sees(monkeypatch, started):
    start, calls, before = BaseProcess.start, [], set(multiprocessing.active_children())

    def interrupted(process: BaseProcess) -> None:
        calls.append(process)
        if len(calls) > started:
            raise KeyboardInterrupt
        start(process)

    monkeypatch.setattr(BaseProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(run_on_workers(build_double, iter(range(20)), 2))
    assert set(multiprocessing.active_children()) <= before
