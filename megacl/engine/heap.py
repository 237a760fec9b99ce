"""What the C library does with large blocks of memory that a step has freed.

By itself glibc gives them back to the system and takes them anew a moment later, at the price of a page fault for each
4 KB. A training step frees and takes the same blocks again and again, so it keeps them; docs/design.md has the gain.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
"""Bytes; mallopt takes an int."""
_LARGEST_BEFORE_2_35 = 32 * 2**20
"""Bytes: the threshold that older versions of glibc take at most."""


def keep_freed_blocks() -> None:
    """From now on freed blocks stay with the process, unless the environment tells glibc's malloc what to do itself.

    Where the C library is another one, nothing is done.
    """
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if told or mallopt is None:
        return
    mallopt(_M_TRIM_THRESHOLD, _LARGEST)
    if not mallopt(_M_MMAP_THRESHOLD, _LARGEST):
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BEFORE_2_35)
