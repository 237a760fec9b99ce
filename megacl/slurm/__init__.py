"""Jobs under SLURM: scripts rendered from slurm/*.sbatch.j2 and a cluster file, submitted, watched, gone on with.

`submit` queues a run. SLURM itself is seen in `queue` alone, through its commands.
"""
