"""What the user can put right. Everything else that is raised is a bug of ours and shows its traceback.

A message says what, where and what to do, in one line; the command line prints it behind the class's name and ends
with exit status 2.
"""

import contextlib
from collections.abc import Iterator


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


class CheckpointError(MegaclError):
    """A checkpoint or run directory is missing, damaged, or belongs to another run."""


class LaunchError(MegaclError):
    """The processes of a run cannot start together."""


class StoppedError(MegaclError):
    """What was under way is not wanted any more, since the process was told to stop: no error, and nothing is lost."""

    exit_status = 75


class DivergedError(MegaclError):
    """The loss or the gradient is not finite any more: not wrong input, but nothing to go on with."""

    exit_status = 1
