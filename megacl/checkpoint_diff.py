"""How two checkpoints differ: settings, state, history, and every tensor.

    for line in difference(open_checkpoint(a), open_checkpoint(b)):
        print(line)

For tensors W and V the absolute difference is max |W - V|, the relative one max |W - V| / max(max |W|, max |V|), and of
a group the largest of its tensors'. A group is what has one name but for the layer's number. Four mebi-elements of W
and of V are in memory at one time.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megacl.checkpoint import Checkpoint
from megacl.checkpoint_files import TensorFiles
from megacl.configfile import to_tree
from megacl.lineage import Lineage, PhaseRecord, entry_name
from megacl.log import table_text

_CHUNK = 2**22
"""Elements of each that are in memory at one time."""
_KINDS = ("exp_avg", "exp_avg_sq", "anchor")


@dataclass
class GroupDifference:
    """How the tensors of one name in all layers differ."""

    group: str
    tensors: int = 0
    differ: int = 0
    """Those of them that are not equal bit for bit."""
    absolute: float = 0.0
    relative: float = 0.0


def difference(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """Lines that say how two checkpoints differ. Raises CheckpointError where a tensor cannot be read."""
    yield f"A: {a.path}"
    yield f"B: {b.path}"
    for title, left, right in (
        ("config", to_tree(a.config), to_tree(b.config)),
        ("state", dataclasses.asdict(a.state), dataclasses.asdict(b.state)),
    ):
        rows = [[f"  {key}", _short(one), _short(other)] for key, one, other in _unlike(left, right)]
        yield f"{title}: {f'{len(rows)} differ' if rows else 'the same'}"
        yield from table_text(["  key", "A", "B"], rows, align="lll") if rows else ()
    yield from _lineages(a.lineage, b.lineage)
    yield from _tensors(a, b)


def _unlike(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The settings of two trees that differ, by their full keys; None where one has no such setting."""
    one, other = dict(_flat(left)), dict(_flat(right))
    for key in [*one, *(key for key in other if key not in one)]:
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a tree by their full keys, phases[1].schedule.kind for one."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(each, dict) for each in value):
            for index, each in enumerate(value):
                yield from _flat(each, f"{prefix}{key}[{index}].")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > 3:
        return f"{len(value)} values"
    text = "-" if value is None else str(value)
    return text if len(text) <= 50 else f"{text[:47]}..."


def _lineages(a: Lineage, b: Lineage) -> Iterator[str]:
    """What the two have in common, and how each goes on."""
    common = next((at for at, pair in enumerate(zip(a.ids, b.ids, strict=False)) if pair[0] != pair[1]), None)
    common = min(len(a.ids), len(b.ids)) if common is None else common
    if a.ids == b.ids:
        yield f"lineage: the same, {common} entries"
        return
    yield f"lineage: the first {common} entries are the same"
    for side, lineage in (("A", a), ("B", b)):
        for index in range(common, len(lineage.entries)):
            entry = lineage.entries[index]
            learned = f", {entry.tokens:,} tokens" if isinstance(entry, PhaseRecord) else ""
            yield f"  {side}: {entry_name(lineage, index)}{learned}  id {lineage.ids[index][:12]}"


def _tensors(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    left, right = TensorFiles(a.path), TensorFiles(b.path)
    for side, these, others in (("A", left, right), ("B", right, left)):
        alone = [name for name in these.index.tensors if name not in others.index.tensors]
        if alone:
            yield f"tensors: {len(alone)} in {side} alone: {', '.join(alone[:5])}{', ...' if len(alone) > 5 else ''}"
    groups: dict[str, GroupDifference] = {}
    for name in sorted(left.index.tensors.keys() & right.index.tensors.keys(), key=_order):
        shapes = left.entry(name)[1], right.entry(name)[1]
        if shapes[0] != shapes[1]:
            yield f"tensors: {name} is {[*shapes[0]]} in A and {[*shapes[1]]} in B"
            continue
        group = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        _add(groups.setdefault(group, GroupDifference(group)), name, left, right)
    count, unequal = (sum(getattr(each, key) for each in groups.values()) for key in ("tensors", "differ"))
    yield f"tensors: {count:,} compared, {unequal:,} differ"
    rows = [
        [f"  {each.group}", str(each.tensors), str(each.differ), f"{each.absolute:.3g}", f"{each.relative:.3g}"]
        for each in groups.values()
        if each.differ
    ]
    if rows:
        yield from table_text(["  tensors", "count", "differ", "largest |A - B|", "relative"], rows)


def _order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Weights first, then the moments; layers by number."""
    kind = next((number for number, kind in enumerate(_KINDS, start=1) if name.startswith(f"{kind}.")), 0)
    return kind, [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _add(group: GroupDifference, name: str, left: TensorFiles, right: TensorFiles) -> None:
    """Counts a tensor in that has one shape in both."""
    absolute = largest = 0.0
    differs, count = False, math.prod(left.entry(name)[1])
    for start in range(0, count, _CHUNK):
        x, y = (files.stretch(name, start, min(_CHUNK, count - start)) for files in (left, right))
        differs |= not x.view(torch.uint8).equal(y.view(torch.uint8))
        absolute = max(absolute, float((x - y).abs().max()))
        largest = max(largest, float(x.abs().max()), float(y.abs().max()))
    group.tensors += 1
    group.differ += differs
    group.absolute = max(group.absolute, absolute)
    group.relative = max(group.relative, absolute / largest if largest else 0.0)
