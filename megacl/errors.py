"""What the user can put right. Everything else that is raised is a bug of ours and shows its traceback.

A message says what, where and what to do, in one line; the command line prints it behind the class's name and ends
with the class's exit status, mostly 2.
"""

import contextlib
from collections.abc import Iterator, Sequence


class MegaclError(Exception):
    """Base of the errors that the command line turns into one line."""

    exit_status = 2
    on_every_rank = True
    """Whether every rank of a run raises it: then rank 0 alone says it."""


@contextlib.contextmanager
def on_this_rank() -> Iterator[None]:
    """A block, such as reading this rank's part of the data, whose errors other ranks may not have."""
    try:
        yield
    except MegaclError as error:
        error.on_every_rank = False
        raise


class ConfigError(MegaclError):
    """A setting is wrong, unknown, or does not fit another one."""


class DataError(MegaclError):
    """An input file, a tokenizer or a data folder is missing, damaged, or not the one that is expected."""


class UnreachableError(DataError):
    """A store or file system did not give its data in the time that it has: not wrong input, and it may come back."""

    exit_status = 1


class CheckpointError(MegaclError):
    """A checkpoint or run directory is missing, damaged, or belongs to another run."""


class ConversionError(MegaclError):
    """A model of another format is missing, damaged, or cannot be expressed in the format that is asked for."""


class LaunchError(MegaclError):
    """The processes of a run cannot start together."""


class RendezvousError(LaunchError):
    """Some ranks of a run did not come to where all of them meet, or left again."""

    def __init__(self, message: str, *, ranks: Sequence[int] = (), nodes: Sequence[str] = ()) -> None:
        """ranks: who is missing or has a problem. nodes: theirs, as far as they are known."""
        super().__init__(message)
        self.ranks, self.nodes = tuple(ranks), tuple(nodes)


class UnhealthyError(LaunchError):
    """Something is wrong with the machines of a run, found before its first step."""

    def __init__(self, message: str, *, nodes: Sequence[str] = ()) -> None:
        """nodes: the bad ones; none where leaving some out would not help."""
        super().__init__(message)
        self.nodes = tuple(nodes)


class FencedError(LaunchError):
    """A later start of the run has taken it over: this one, which may have been given up, writes nothing more."""


class LostPeerError(MegaclError):
    """Another rank does not answer any more: not this one's fault, and who failed is to be found."""

    exit_status = 1


class StoppedError(MegaclError):
    """What was under way is not wanted any more, since the process was told to stop: no error, and nothing is lost."""

    exit_status = 75


class RunFailedError(MegaclError):
    """A run of a study has failed; the study ends with its status."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class DivergedError(MegaclError):
    """The loss or the gradient is not finite any more: not wrong input, but nothing to go on with."""

    exit_status = 1
