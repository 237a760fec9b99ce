"""Rounds of all kinds, and the table of what they found."""

import random
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from faultsim import damage, disks, kills
from faultsim.rounds import COLUMNS, FAILED, Round
from faultsim.world import World
from megacl.log import table_text

KINDS: dict[str, Callable[[Round], None]] = {
    "kill-train": kills.kill_train,
    "kill-save": kills.kill_save,
    "kill-convert": kills.kill_convert,
    "kill-prune": kills.kill_prune,
    "stop-save": kills.stop_save,
    "disk-full": disks.disk_full,
    "read-only": disks.read_only,
    "flipped": damage.flipped,
    "truncated": damage.truncated,
    "missing": damage.missing,
    "two-processes": kills.two_processes,
}
MOUNTS = ("disk-full", "read-only")
"""Kinds that need mounts."""


@dataclass(frozen=True)
class Verdict:
    """What came of a round."""

    kind: str
    number: int
    """Of the rounds of its kind, from 0; with seed and kind it makes the round."""
    moment: str
    in_the_midst: bool
    problems: tuple[tuple[str, str], ...]
    """Each: one of COLUMNS, and what is wrong."""
    seconds: float


def play(world: World, kind: str, *, seed: int, number: int) -> Verdict:
    """Plays the number-th round of a kind. Its folder stays where something was wrong."""
    begun = time.monotonic()
    folder = world.folder / f"{kind}-{number}"
    folder.mkdir()
    turn = Round(world, folder, random.Random(f"{seed} {kind} {number}"))
    try:
        KINDS[kind](turn)
    except (OSError, ValueError, LookupError, AssertionError, RuntimeError, subprocess.SubprocessError):
        turn.note(FAILED, traceback.format_exc())
    finally:
        turn.close()
    if not turn.problems:
        shutil.rmtree(folder)
    seconds = time.monotonic() - begun
    return Verdict(kind, number, turn.moment, turn.in_the_midst, tuple(turn.problems), seconds)


def campaign(world: World, kinds: Sequence[str], *, rounds: int, seed: int) -> Iterator[Verdict]:
    """Plays so many rounds: the kinds in turn, each time in an order that is drawn anew."""
    draw, order = random.Random(seed), list(kinds)
    for index in range(rounds if order else 0):
        number, place = divmod(index, len(order))
        if place == 0:
            draw.shuffle(order)
        yield play(world, order[place], seed=seed, number=number)


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """The table: a row a kind, and one of sums. A round counts once in each column in which something was wrong."""
    rows = []
    for kind in [*KINDS, "all"]:
        of_kind = [each for each in verdicts if kind in (each.kind, "all")]
        if of_kind:
            wrong = [sum(any(found == column for found, _ in each.problems) for each in of_kind) for column in COLUMNS]
            rows.append([kind, len(of_kind), sum(each.in_the_midst for each in of_kind), *wrong])
    return list(table_text(["kind", "rounds", "in the midst", *COLUMNS], [list(map(str, row)) for row in rows]))
