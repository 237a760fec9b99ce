"""`megacl`, and `python -m megacl`: what a shell, torchrun and srun start on every rank."""

import faulthandler
import os
import signal
import sys

# A scheduler may send SIGUSR1 at any moment, also while the imports below take their seconds, and its default action is
# to kill. Held back from the first line on, it reaches a training run once that listens (trainer.py), and is not lost.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
# SIGUSR2 shows what all threads are doing, and the command goes on.
faulthandler.register(signal.SIGUSR2)

from megacl import cli  # noqa: E402


def main() -> None:
    """The command line. A rank of several ends without the interpreter's own ending.

    By then all is saved, and the ranks have left one another; what is left are gloo's and DeepSpeed's threads. One that
    lets go of a tensor while the interpreter ends is ended by it inside C++, which takes the whole process down:
    "terminate called without an active exception", and status 134 of a run that is done.
    """
    try:
        cli.main()
    except SystemExit as end:
        if os.environ.get("WORLD_SIZE", "1") == "1" or not isinstance(end.code, int | None):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)


if __name__ == "__main__":
    main()
