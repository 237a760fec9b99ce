"""Waiting for the batch: what befalls one rank ends it on all of them."""

from types import SimpleNamespace
from typing import Any

from megacl.errors import DataError
from megacl.parallel.ranks import Ranks
from megacl.waiting import next_batch
from tests.ranks import run_on_ranks


def what_a_waiting_rank_hears(ranks: Ranks) -> tuple[str, int]:
    """Rank 0's data comes slowly, three pieces of it, and stays away for a while in between. How often it was said."""
    pieces = iter([(pieces, True) for pieces in (1, 1, 2, 2, 3, 3, 3, 3)])
    come, heard = [0], []
    stop: Any = SimpleNamespace(received=False)

    def poll(seconds: float | None) -> Any:
        if ranks.rank:
            return SimpleNamespace(targets=1)
        come[0], left = next(pieces, (3, False))
        return None if left else SimpleNamespace(targets=1)

    saves: Any = SimpleNamespace(written=False)
    found = next_batch(poll, ranks, stop, saves, arrived=lambda: come[0], progress=lambda: heard.append(come[0]))
    return str(found is not None), len(heard)


def test_data_that_comes_slowly_to_one_rank_is_progress_on_all_and_data_that_stays_away_is_none() -> None:
    assert run_on_ranks(2, what_a_waiting_rank_hears) == [("True", 3)] * 2


def what_a_rank_does(ranks: Ranks, case: str) -> tuple[str, int]:
    """Rank 0 never gets its part of a batch; the last rank has its own at once. And how often it was to save."""
    mine = ranks.rank != 0
    saved: list[None] = []
    saves: Any = SimpleNamespace(written=False, finish=lambda: saved.append(None))
    stop: Any = SimpleNamespace(received=case == "told" and mine)

    def poll(seconds: float | None) -> Any:
        if case == "broken" and not mine:
            raise DataError("rank 0 cannot read")
        return SimpleNamespace(targets=1) if mine else None

    try:
        return str(next_batch(poll, ranks, stop, saves)), len(saved)
    except DataError as error:
        return f"{error} {error.on_every_rank}", len(saved)


def test_one_rank_that_waits_for_data_or_cannot_read_it_ends_all_of_them_alike() -> None:
    assert run_on_ranks(2, what_a_rank_does, "told") == [("None", 0)] * 2
    assert run_on_ranks(2, what_a_rank_does, "broken") == [("rank 0 cannot read True", 1)] * 2
