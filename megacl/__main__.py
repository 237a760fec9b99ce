"""`megacl`, and `python -m megacl`: what a shell, torchrun and srun start on every rank."""

import signal

# A scheduler may send SIGUSR1 at any moment, also while the imports below take their seconds, and its default action is
# to kill. Held back from the first line on, it reaches a training run once that listens (trainer.py), and is not lost.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

from megacl.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
