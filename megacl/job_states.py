"""SLURM's words for what has become of a job, in two kinds."""

_OVER = "COMPLETED FAILED CANCELLED TIMEOUT DEADLINE PREEMPTED NODE_FAIL BOOT_FAIL OUT_OF_MEMORY REVOKED"
_WITHOUT_NODES = "PENDING REQUEUED REQUEUE_HOLD REQUEUE_FED RESV_DEL_HOLD SPECIAL_EXIT"

ENDED = frozenset(_OVER.split())
"""It is over, and only remembered for some minutes more."""
WAITING = frozenset(_WITHOUT_NODES.split())
"""It has no nodes yet, or not any more."""
