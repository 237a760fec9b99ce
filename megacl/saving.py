"""Saving a checkpoint: copied to host memory, written by a thread while training goes on, published at a known step.

    saving = Saving(engine, ranks, run_dir, config=config, tokenizer=tokenizer)
    saving.begin(state, lineage)            # training may go on behind it
    engine.step(...)                        # its forward and backward pass run beside the copying, its update behind it
    ...                                     # saving.written: this rank's part is on the disk, or could not be
    saving.advance()                        # where that is so on all ranks: they exchange what they wrote
    ...
    saved = saving.advance()                # it is published; saving.conclude() waits for all of it

Every tensor has one owner among the ranks, which receives it whole and writes it into files of its own. What an owner
holds itself its thread copies, and only the engine's next update waits for that; what comes from other ranks travels in
`begin`. All write into one hidden folder beside the checkpoint's name; rank 0 adds the small files and, at last, index
and manifest. The threads say nothing to one another: what they did is exchanged in `advance`, which all ranks call at
one step.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megacl.checkpoint import RunState, checkpoint_path, list_checkpoints
from megacl.checkpoint_files import Contents, tensor_name, write_manifest, write_tensors, write_text
from megacl.config import RunConfig
from megacl.configfile import dump
from megacl.data.tokenizer import Tokenizer
from megacl.engine import Engine
from megacl.errors import DataError, DivergedError, MegaclError, StoppedError
from megacl.lineage import Lineage
from megacl.parallel.ranks import Ranks
from megacl.publish import delete_folder, disk_errors, flush_folder, name_beside, publish_folder
from megacl.tensorfile import facts_of

_WHAT = "a checkpoint"
_ABOUT = 0.9
"""Of the most that any rank holds of a tensor: at ZeRO-3 the last rank's shard is smaller by a few elements."""


def owners_of(sizes: Mapping[str, int], holdings: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The rank that owns each tensor, so that little has to travel, and all own about as many bytes.

    sizes: elements of each tensor. holdings: for each rank, how many of them it holds, as `Engine.holdings`. The
    largest tensors come first, each to a rank that holds about as much of it as any does, of these to the one that
    owns least yet, the first of several. But no rank owns more than a fair share and the largest tensor: what would be
    too much goes to who owns least. A function of these numbers and the names alone.
    """
    loads = [0] * len(holdings)
    most = sum(sizes.values()) / len(loads) + max(sizes.values(), default=0)
    found = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        held = [each.get(name, 0) for each in holdings]
        enough = _ABOUT * max(held)
        ranks = [rank for rank, size in enumerate(held) if size >= enough and loads[rank] + sizes[name] <= most]
        owner = min(ranks or range(len(loads)), key=loads.__getitem__)
        found[name] = owner
        loads[owner] += sizes[name]
    return found


def owners_among(ranks: Ranks, engine: Engine) -> dict[str, int]:
    """`owners_of` of an engine's parameters, by name: the same for every save. A collective."""
    sizes = {name: shape.numel() for name, shape in engine.shapes.items()}
    return owners_of(sizes, ranks.gather(engine.holdings()))


@dataclass
class _Save:
    """A save under way, on one rank."""

    state: RunState
    lineage: Lineage
    path: Path
    beside: Path
    """The folder that is renamed to it."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """What this rank owns, by parameter and key, in host memory: there once it is copied."""
    copies: list[tuple[Tensor, Tensor]]
    """(into, source) of what is still to be copied."""
    stream: torch.cuda.Stream | None
    """In which it is copied, where there is a GPU."""
    owners: int
    outcome: Contents | Exception | None = None
    seconds: float = 0.0
    """Spent writing."""
    publishing: bool = False
    """Whether all have written, and rank 0 makes it a checkpoint."""
    given_up: bool = False
    copied: threading.Event = field(default_factory=threading.Event)
    held_up: float = 0.0
    """Seconds for which the engine waited for the copying."""
    thread: threading.Thread = field(init=False)


class Saving:
    """The saves of one run, on one rank; at most one is under way. Every rank has one, and calls it alike."""

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        run_dir: Path,
        *,
        config: RunConfig,
        tokenizer: Tokenizer,
        permit: Callable[[], None] = lambda: None,
    ) -> None:
        """permit: called on each rank's thread before it writes, and on rank 0's before it publishes; it may raise."""
        self._engine, self._ranks, self._run_dir, self._permit = engine, ranks, run_dir, permit
        self._config, self._tokenizer = config, tokenizer
        self._save: _Save | None = None
        self._left: list[Path] = []  # of saves that failed where the disk refused to delete, too
        self._memory: dict[tuple[str, str], Tensor] = {}  # kept from save to save: new pages take longer than copying
        self._owners: dict[str, int] = {}  # the same for every save

    @property
    def under_way(self) -> bool:
        """Whether a save was begun and not concluded; the same on all ranks."""
        return self._save is not None

    @property
    def written(self) -> bool:
        """Whether this rank has done its part of what is under way, or has failed to: others are waited for."""
        return self._save is not None and not self._save.thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """Waits for this rank's part of the save under way, at the longest so many seconds: whether it is written."""
        assert self._save is not None, "no save is under way"
        self._save.thread.join(seconds)
        return self.written

    def begin(self, state: RunState, lineage: Lineage) -> None:
        """Sends the engine's state to the owners, and starts to copy it to host memory and to write it.

        No other save may be under way. The engine's next change of its state waits until it is copied.
        """
        assert self._save is None, "a save is under way"
        engine, ranks = self._engine, self._ranks
        engine.before_change()  # whoever else reads the engine's state may still do so
        engine.before_change = self._finish_copying
        state = dataclasses.replace(state, optimizer_step=engine.optimizer_step, loss_scale=engine.loss_scale)
        path = checkpoint_path(self._run_dir, state.step)
        self._owners = self._owners or owners_among(ranks, engine)
        before, self._memory = self._memory, {}
        copies: list[tuple[Tensor, Tensor]] = []

        def room(name: str, key: str, shape: torch.Size) -> Tensor:
            kept = before.get((name, key))
            if kept is None:  # pinned, a GPU copies into it several times as fast; this has not run on one yet
                kept = torch.empty(shape, dtype=torch.float32, pin_memory=torch.cuda.is_available())
            self._memory[name, key] = kept
            return self._memory[name, key]

        def later(into: Tensor, source: Tensor) -> None:
            copies.append((into, source))

        owned = {name: tensors for name, tensors in engine.export_state(self._owners, room, later) if tensors}
        stream = None
        if torch.cuda.is_available():  # beside what the engine sends from here on, behind what it has sent
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
        beside = ranks.gather(name_beside(path))[0]  # which waits for who has more to send, as long as that takes
        self._save = save = _Save(state, lineage, path, beside, owned, copies, stream, ranks.world_size)
        self._start(save, partial(self._write, save))

    def _finish_copying(self) -> None:
        """Waits until what is being saved may be changed in the engine."""
        if (save := self._save) is not None and not save.copied.is_set():
            begun, left = time.perf_counter(), len(save.copies)
            while not save.copied.wait(1.0):
                if len(save.copies) < left:  # new pages of memory may take long on a CPU
                    left = len(save.copies)
                    self._engine.progress()
            save.held_up += time.perf_counter() - begun

    def _check_finite(self, save: _Save) -> None:
        for key in ("weight", "exp_avg", "exp_avg_sq", "anchor"):
            for name, tensors in save.tensors.items():
                if key not in tensors or _is_finite(tensors[key]):
                    continue
                known = list_checkpoints(self._run_dir)
                good = f"the last good one is {known[-1]}" if known else "there is none yet"
                raise DivergedError(
                    f"step {save.state.step}: {tensor_name(name, key)} is not finite, and no checkpoint was made of "
                    f"it; {good}. Lower max_lr in a new run_dir."
                )

    def _start(self, save: _Save, work: Callable[[], None]) -> None:
        """Lets a thread do a part of the save. What it raises is raised where all hear of it."""

        def run() -> None:
            begun = time.perf_counter()
            try:
                with disk_errors(save.path, _WHAT):
                    work()
            except Exception as error:
                save.outcome = error
            save.seconds += time.perf_counter() - begun

        save.thread = threading.Thread(target=run, name=f"save {save.state.step}")
        save.thread.start()

    def _write(self, save: _Save) -> None:
        """Copies what is left to copy, and writes this rank's files."""

        def goes_on() -> None:
            if save.given_up:
                raise StoppedError(f"{save.path}: given up.")

        _copy(save)
        self._check_finite(save)
        self._permit()
        save.beside.mkdir(parents=True, exist_ok=True)
        rank = self._ranks.rank
        contents = write_tensors(save.beside, rank, save.owners, save.tensors, goes_on)
        if rank == 0:
            small = _write_small(save.beside, save.state, save.lineage, self._config, self._tokenizer)
            contents = Contents.together([contents, small])
        flush_folder(save.beside)
        save.outcome = contents

    def advance(
        self, before_publishing: Callable[[], None] = lambda: None, sync: Callable[[], None] = lambda: None
    ) -> "Saved | None":
        """Takes the save under way one step on, once `written` is true on all ranks; else it waits for that.

        The first step is that the ranks exchange what they have written, and rank 0 begins to publish it: None. The
        second, that all learn that it is published. before_publishing: called on every rank; it may raise DataError.
        sync: called by rank 0's thread before it publishes; it may raise OSError.
        Raises on all ranks DivergedError where a number is not finite, DataError where one cannot write; then nothing
        is published, and nothing of it stays.
        """
        save, ranks = self._save, self._ranks
        assert save is not None, "no save is under way"
        save.thread.join()
        try:
            if isinstance(save.outcome, Exception) and not isinstance(save.outcome, MegaclError):
                raise save.outcome
            outcomes, seconds, held_up = zip(*ranks.gather((save.outcome, save.seconds, save.held_up)), strict=True)
            errors = [outcome for outcome in outcomes if isinstance(outcome, MegaclError)]
            if errors:  # of several, the one that ends the run
                raise min(errors, key=lambda error: not isinstance(error, DivergedError))
            parts = list(outcomes)
            if save.publishing:
                self._save = None
                self._delete()
                size = sum(facts.size for contents in parts for facts in contents.files.values())
                return Saved(save.path, save.state, save.lineage, size, max(seconds), max(held_up))
            with ranks.together():
                before_publishing()
            save.publishing = True
            if ranks.rank == 0:
                self._start(save, partial(_publish, save.beside, save.path, parts, sync, self._permit))
        except BaseException:
            self._save = None
            if ranks.rank == 0:
                save.thread.join()  # it may be publishing already
                self._delete(save.beside)
            raise
        return None

    def conclude(self) -> "Saved":
        """Waits until the save under way is published. Raises as `advance` does."""
        while (saved := self.advance()) is None:
            pass
        return saved

    def abandon(self) -> None:
        """Gives up the save under way, if there is one; what of it is on the disk goes. No collective.

        Rank 0 finishes what it is publishing, and the others leave that alone.
        """
        if self._save is not None:
            self._save.given_up = True
            self._save.thread.join()
            if self._ranks.rank == 0 or not self._save.publishing:
                self._delete(self._save.beside)
            self._save = None

    def _delete(self, *folders: Path) -> None:
        """Deletes what is left of saves; what the disk keeps now goes when a later one is published, or is swept."""
        left = [*self._left, *folders]
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        self._left = [folder for folder in left if os.path.lexists(folder)]


@dataclass(frozen=True)
class Saved:
    """A save that was published."""

    path: Path
    state: RunState
    lineage: Lineage
    size: int
    """Bytes of all of its files but index and manifest."""
    seconds: float
    """For which the rank that took longest copied and wrote."""
    held_up: float
    """Seconds for which an engine waited, before it changed its state, until that was copied, on the rank where it
    waited longest."""


def _copy(save: _Save) -> None:
    """Copies what is left to copy, in the save's thread, and lets the engine go on in any case."""
    try:
        if save.stream is not None:  # which device is the current one, each thread knows for itself
            torch.cuda.set_device(save.stream.device)
        with torch.cuda.stream(save.stream) if save.stream else contextlib.nullcontext():
            while save.copies:
                into, source = save.copies[-1]
                into.copy_(source)
                save.copies.pop()
    finally:
        save.copies.clear()
        save.copied.set()


def _is_finite(tensor: Tensor) -> bool:
    # A sum is one quick pass; where it is too large for fp32, it takes a slow one to know.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _publish(
    beside: Path, path: Path, parts: list[Contents], sync: Callable[[], None], permit: Callable[[], None]
) -> None:
    for contents in parts:
        for name, facts in contents.files.items():
            if not (beside / name).is_file() or (beside / name).stat().st_size != facts.size:
                raise DataError(
                    f"{beside / name}: another rank has written it, and it is not seen here; "
                    "the run directory must lie where all ranks see it."
                )
    sync()
    write_manifest(beside, parts)
    flush_folder(beside)
    permit()
    try:
        os.rename(beside, path)
    except FileNotFoundError:  # a later start of the run has taken it away
        permit()
        raise
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        _replace(beside, path, permit)
    flush_folder(path.parent)


def _replace(beside: Path, path: Path, permit: Callable[[], None]) -> None:
    """Publishes in place of what stands there: a damaged checkpoint that resume passed over.

    Where a later start of the run has taken `beside` meanwhile, what stands there may be its own, and stays.
    """
    aside = name_beside(path)
    permit()
    os.rename(path, aside)
    try:
        os.rename(beside, path)
    except OSError:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def save_checkpoint(
    engine: Engine,
    ranks: Ranks,
    run_dir: Path,
    state: RunState,
    *,
    lineage: Lineage,
    config: RunConfig,
    tokenizer: Tokenizer,
) -> Path:
    """Publishes RUN/checkpoints/step-N, and waits for it. Every rank calls it. Returns the checkpoint's folder.

    Raises DataError where the disk refuses, DivergedError where a weight is not finite; what was there before stays
    untouched.
    """
    saving = Saving(engine, ranks, run_dir, config=config, tokenizer=tokenizer)
    saving.begin(state, lineage)
    return saving.conclude().path


def publish_checkpoint(
    path: Path,
    write: Callable[[Path], Contents],
    state: RunState,
    *,
    lineage: Lineage,
    config: RunConfig,
    tokenizer: Tokenizer,
) -> None:
    """Publishes a checkpoint at `path`, whose tensors `write` puts into the folder that it is given.

    It returns what it wrote; of files that hold no tensors it need not speak. Raises DataError where the disk refuses,
    and what `write` raises; what was there before stays untouched.
    """
    with publish_folder(path, _WHAT) as folder:
        write_manifest(folder, [write(folder), _write_small(folder, state, lineage, config, tokenizer)])
        delete_folder(path)  # a damaged one that was passed over


def _write_small(folder: Path, state: RunState, lineage: Lineage, config: RunConfig, tokenizer: Tokenizer) -> Contents:
    """Writes all files of a checkpoint but those of tensors, index and manifest. Raises OSError or DataError."""
    write_text(folder / "state.json", json.dumps(dataclasses.asdict(state), indent=1) + "\n")
    write_text(folder / "lineage.json", lineage.dump())
    write_text(folder / "config.yaml", dump(config))
    tokenizer.save(folder)
    small = [file for file in folder.iterdir() if file.suffix != ".safetensors"]  # other ranks write here too
    return Contents({file.name: facts_of(file) for file in small})
