"""`python -m megacl`: what torchrun and srun start on every rank."""

from megacl.cli import main

if __name__ == "__main__":
    main()
