"""Files that are not what was written: flipped bits, files that are cut short, files that are gone."""

import shutil
from collections.abc import Callable
from pathlib import Path

from faultsim.rounds import FAILED, Round
from megacl.checkpoint import list_checkpoints, verify_checkpoint

_FLIPS = 20
"""Bits that are flipped in each file, one at a time."""


def flipped(turn: Round) -> None:
    """A flipped bit in any file of a checkpoint, at drawn places, is found."""

    def flip(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(_with_a_flip(turn, content))

    newest = _copied(turn)
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for _ in range(_FLIPS):
            flip(path)
            if not verify_checkpoint(newest):
                turn.note(FAILED, f"a flipped bit of {path} was not found")
            path.write_bytes(whole)
    _damage(turn, newest, "a flipped bit", flip)


def truncated(turn: Round) -> None:
    """A file that is cut short is found."""

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: turn.draw.randrange(path.stat().st_size)])

    _damage(turn, _copied(turn), "a cut", cut)


def missing(turn: Round) -> None:
    """A file that is gone is found."""
    _damage(turn, _copied(turn), "a loss", Path.unlink)


def _copied(turn: Round) -> Path:
    """Copies the undisturbed run; its newest checkpoint."""
    shutil.copytree(turn.world.run_dir, turn.run_dir)
    return list_checkpoints(turn.run_dir)[-1]


def _damage(turn: Round, newest: Path, what: str, damage: Callable[[Path], None]) -> None:
    """Damages a drawn file of a run's newest checkpoint: that is named, and the run goes on from the one before."""
    path = turn.draw.choice(sorted(newest.iterdir()))
    turn.moment = f"{what} in {path.name}"
    damage(path)
    turn.in_the_midst = True
    _, text = turn.ended(turn.start("checkpoint", "verify", str(turn.run_dir)), 2)
    named = [line for line in text.splitlines() if newest.name in line and "is as its manifest says" not in line]
    if not named:
        turn.note(FAILED, f"`megacl checkpoint verify` did not name {path}: {text!r}")
    text = turn.go_on()
    if newest.name not in text:
        turn.note(FAILED, f"the run did not say that it passes over {newest}")


def _with_a_flip(turn: Round, content: bytes) -> bytes:
    """The content with one drawn bit flipped."""
    found = bytearray(content)
    found[turn.draw.randrange(len(found))] ^= 1 << turn.draw.randrange(8)
    return bytes(found)
