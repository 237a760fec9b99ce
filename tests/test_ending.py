"""What a rank leaves behind of a run, and the watchdog that notices when nothing moves on."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Prepared

from megacl.attempts import read_attempts, read_outcome
from megacl.configfile import from_tree
from megacl.ending import is_lost_peer
from megacl.errors import ConfigError, DataError
from megacl.parallel.alive import Missed
from megacl.publish import alone_in
from megacl.trainer import train
from megacl.watchdog import Silence, Watchdog

PATIENCE = 240


def test_a_run_leaves_its_outcome_and_each_attempt_when_it_began(prepared: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = from_tree(prepared.tree(run_dir))
    assert train(config, until_phase="english") == "done"
    first = read_outcome(run_dir)
    assert first is not None
    assert (first.outcome, first.exit_status, first.step, first.attempt) == ("done", 0, 12, 1)
    assert first.message == "trained until the end of phase english"
    assert train(config) == "done"
    last = read_outcome(run_dir)
    assert last is not None
    assert (last.outcome, last.step, last.attempt) == ("done", 20, 2)
    attempts = read_attempts(run_dir)
    assert [(attempt.step, len(attempt.ranks)) for attempt in attempts] == [(0, 1), (12, 1)]
    for attempt in attempts:
        assert attempt.first_step is not None
        assert attempt.started < attempt.time < attempt.first_step

    # What is refused before the ranks hold the run is its outcome too, but for a run of somebody else's.
    changed = from_tree(prepared.tree(run_dir, seed=7))
    with alone_in(run_dir, "a run"), pytest.raises(DataError, match="is at work there"):
        train(changed)
    assert read_outcome(run_dir) == last
    with pytest.raises(ConfigError, match="holds a run with seed 0"):
        train(changed)
    refused = read_outcome(run_dir)
    assert refused is not None
    assert (refused.outcome, refused.exit_status, refused.attempt) == ("wrong_input", 2, None)
    assert "holds a run with seed 0" in refused.message
    assert len(read_attempts(run_dir)) == 2


def test_nothing_is_left_where_there_is_no_run(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    with pytest.raises(ConfigError):
        train(from_tree(prepared.tree(tmp_path / "letters", global_batch_size=7, engine={"micro_batch_size": 2})))
    assert list((tmp_path / "letters").iterdir()) == []


def test_the_watchdog_says_when_nothing_moves_on() -> None:
    watchdog, barked, said = Watchdog(0.2), threading.Event(), []

    def hung(silence: Silence) -> None:
        said.append((silence, watchdog.doing))
        barked.set()

    with watchdog.watching(hung, lambda suspicious: False):
        watchdog.begin("step 1")
        assert barked.wait(PATIENCE)
    (silence, doing) = said[0]
    assert doing == "step 1"
    assert silence.seconds > 0.2


def test_another_ranks_bark_is_heard_once_this_one_is_silent_too() -> None:
    watchdog, barked, suspicions = Watchdog(4.0), threading.Event(), []

    def look(suspicious: bool) -> bool:
        suspicions.append(suspicious)
        return suspicious

    with watchdog.watching(lambda silence: barked.set(), look):
        watchdog.begin("step 1")
        assert barked.wait(PATIENCE)
    assert suspicions[-1]


@pytest.mark.parametrize("alone", [True, False])
def test_time_for_which_a_process_was_suspended_counts_only_where_others_wait_for_it(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = [0.0]
    monkeypatch.setattr("megacl.watchdog.time", SimpleNamespace(monotonic=lambda: time.monotonic() + slept[0]))
    watchdog, barked, looks = Watchdog(1000), threading.Event(), threading.Semaphore(0)

    def look(suspicious: bool) -> bool:
        looks.release()
        return False

    with watchdog.watching(lambda silence: barked.set(), look, alone=alone):
        watchdog.begin("step 1")
        assert looks.acquire(timeout=PATIENCE)
        slept[0] = 5000.0
        if alone:
            assert looks.acquire(timeout=PATIENCE)
            assert looks.acquire(timeout=PATIENCE)
        assert barked.wait(0 if alone else PATIENCE) != alone


def test_a_rank_that_gives_no_sign_of_life_is_missed_only_while_this_one_waits_as_long_as_it_takes() -> None:
    watchdog, barked, said, asked = Watchdog(1000), threading.Event(), [], threading.Semaphore(0)

    def others(seconds: float) -> Missed:
        assert seconds == 1000
        asked.release()
        return Missed((3, 5), 1234.5)

    def hung(silence: Silence) -> None:
        said.append(silence)
        barked.set()

    looks = threading.Semaphore(0)
    watchdog.begin("step 1")
    with watchdog.watching(hung, lambda suspicious: bool(looks.release()), others=others):
        assert looks.acquire(timeout=PATIENCE)
        assert looks.acquire(timeout=PATIENCE)
        assert not asked.acquire(blocking=False)
        with watchdog.resting("saving"):
            assert barked.wait(PATIENCE)
    assert said == [Silence(1234.5, 0.0, (3, 5))]


def test_a_folder_that_does_not_answer_leaves_the_watchdog_awake() -> None:
    watchdog, barked, looks = Watchdog(1.0), threading.Event(), threading.Semaphore(0)

    def look(suspicious: bool) -> bool:
        looks.release()
        raise OSError("stale file handle")

    with watchdog.watching(lambda silence: barked.set(), look):
        assert looks.acquire(timeout=PATIENCE)
        assert looks.acquire(timeout=PATIENCE)
        watchdog.begin("step 1")
        assert barked.wait(PATIENCE)


def test_what_may_take_long_is_no_silence_and_what_moves_on_ends_it() -> None:
    watchdog = Watchdog(1000)
    assert watchdog.silent == 0.0
    watchdog.progress()
    assert watchdog.silent == 0.0
    watchdog.begin("step 1")
    threading.Event().wait(0.01)
    before = watchdog.silent
    assert before > 0.0
    watchdog.note("a part of it")
    assert (watchdog.doing, watchdog.silent >= before) == ("a part of it", True)
    with watchdog.resting("saving"):
        assert (watchdog.doing, watchdog.silent) == ("saving", 0.0)
    assert watchdog.doing == "a part of it"
    threading.Event().wait(0.01)
    assert watchdog.silent > 0.0
    watchdog.rest("between phases")
    assert watchdog.silent == 0.0


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (
            RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [1]"),
            True,
        ),
        (RuntimeError("NCCL communicator was aborted on rank 1."), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("gloo/ is no folder"), False),
    ],
)
def test_errors_that_only_say_that_another_rank_is_gone_are_known(error: Exception, lost: bool) -> None:
    assert is_lost_peer(error) == lost
