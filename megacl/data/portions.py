"""Raw files -> portions -> tasks: who does what, decided from the files' sizes alone.

A portion is some consecutive files that are at most `block_bytes` on disk together, or one file that is larger. Blocks
are cut inside a portion, so a portion can be done without a look at any other. A task is some portions: the largest one
goes to the task that has least so far, then the next, so that tasks are about equal where no single file outweighs one.
"""

import heapq
from collections.abc import Sequence

from megacl.data.forms import RawFile

Portion = tuple[RawFile, ...]


def cut_portions(files: Sequence[RawFile], block_bytes: int) -> list[Portion]:
    """The files as portions, in order."""
    portions: list[Portion] = []
    held: list[RawFile] = []
    size = 0
    for file in files:
        if held and size + file.size > block_bytes:
            portions.append(tuple(held))
            held, size = [], 0
        held.append(file)
        size += file.size
    return [*portions, tuple(held)] if held else portions


def portions_of_task(portions: Sequence[Portion], task: int, tasks: int) -> list[int]:
    """The numbers of the portions that one task of 1 to `tasks` does, in order; none where there are too few."""
    sizes = [sum(file.size for file in portion) for portion in portions]
    loads = [(0, number) for number in range(1, min(tasks, len(sizes)) + 1)]  # the others would get none
    mine = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, number = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[index], number))
        if number == task:
            mine.append(index)
    return sorted(mine)
