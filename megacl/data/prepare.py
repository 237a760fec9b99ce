"""Raw documents -> tokenized shards, on all cores, restartable: `megacl prepare INPUT... --tokenizer MODEL --out DIR`.

    if __name__ == "__main__":  # workers import the script
        prepare(["raw/"], tokenizer=load_tokenizer("tokenizer.model"), out="data/english")

The inputs are cut into portions by their files' sizes (data/portions.py), and these into blocks (data/documents.py); a
block becomes at most one train and one validation shard, written by whichever worker has it; only counts come back.
What a block becomes depends on nothing but its lines, the tokenizer and the settings, so the folder's bytes depend
neither on the number of workers nor on the number of tasks.

On many machines each does a task, a share of the portions, and one of them merges at the end (data/tasks.py):

    prepare(["raw/"], tokenizer=..., out="data/english", task=(3, 8))     # --task 3/8
    merge("data/english")                                                 # megacl data merge data/english

Until the end everything lies in OUT/.prepare, and the same command goes on after an interruption (data/blocks.py). At
the end the shards move to OUT, and shards.arrow and manifest.json follow (data/generations.py): a new generation, while
readers of the earlier ones see no change.

Held out for validation are the documents whose BLAKE2b hash (8 bytes of it, as a fraction of 2^64) lies below
`validation`: a function of the raw text alone, the same under every tokenizer, and copies of a document stay together.

Memory: what data/blocks.py says for each worker and a few blocks for the parent, whatever the size of the inputs.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacl.data.blocks import Recipe
from megacl.data.documents import block_bytes_of
from megacl.data.duplicates import hashes_of, is_known, is_repeated
from megacl.data.forms.reading import Reading
from megacl.data.generations import (
    PREPARE_WORK,
    Change,
    FolderState,
    finish_interrupted,
    is_interrupted,
    open_state,
    publish_generation,
)
from megacl.data.inputs import STANDARD_INPUT, Inputs, find_inputs, identify, keep_standard_input, refuse_twice
from megacl.data.joining import check_held_out, made_already, open_folder
from megacl.data.manifest import Generation, no_manifest, read_manifest, read_removed
from megacl.data.rewrite import rewrite_shards
from megacl.data.shard_list import Mask, ShardList, Totals
from megacl.data.tasks import (
    COMMAND_FOLDER,
    AllTasks,
    Command,
    TaskRecord,
    begin_command,
    check_nothing_lost,
    digest_of_files,
    files_of_task,
    folder_of_task,
    gather_tasks,
    read_command,
    read_task,
    run_task,
)
from megacl.data.tokenizer import Tokenizer, load_tokenizer
from megacl.data.workers import usable_cores
from megacl.errors import ConfigError, DataError
from megacl.publish import alone_in, among_others_in, delete_folder, disk_errors


@dataclass(frozen=True)
class PrepareReport:
    """What a call of `prepare` or `merge` added to a data folder, or what a task has ready for it."""

    generation: int | None  # None: a task, which publishes nothing
    documents: int  # held-out ones included
    tokens: int
    text_bytes: int
    held_out: int
    bad_lines: int
    empty_documents: int
    removed_documents: int  # duplicates, with dedup, and those that were removed on request earlier
    passed_over: tuple[str, ...]  # the files of other kinds in the folders that were searched
    seconds: float


def prepare(
    inputs: Sequence[str],
    *,
    tokenizer: Tokenizer,
    out: str | Path,
    source: str | None = None,
    validation: float = 0.01,
    reading: Reading | None = None,
    skip_bad: bool = False,
    dedup: bool = False,
    dedup_against: Sequence[str | Path] = (),
    task: tuple[int, int] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    block_bytes: int | None = None,
) -> PrepareReport:
    """Tokenizes raw documents into a data folder, as a new generation if the folder has one already.

    inputs: files of every form that data/forms reads, folders, patterns, "-" for standard input, see data/inputs.py;
    files of other kinds in folders are passed over and named in the report. source: a name for the data; the folder's
    by default. validation: the part of the documents to hold out, in [0, 1). reading: where a document has its text,
    its encoding and normal form; by default the field "text" in UTF-8, as it is.
    skip_bad: leave out lines without a document, and count them, instead of stopping. dedup: leave out documents whose
    text stands earlier in the inputs or in the folder's newest generation; dedup_against: and those that these other
    data folders hold, for training or held out. task: (I, N) does share I of N, counted from 1, and publishes nothing;
    it may run while other tasks of the same command do, and `merge` publishes what all of them did. workers: processes;
    by default one for each core that this process may use. progress: called with the bytes of input done and in all.
    block_bytes: input that becomes one shard; by default it follows from the size of all inputs. A command that has
    been carried out already does nothing; input files are known by their whole content, under any name, which is read
    once for that before all else.

    ConfigError: validation, task or workers out of range, source or field not UTF-8. DataError: the inputs, a line of
    them, the folder or the disk; fewer than 20 held-out documents in the whole folder. LaunchError: a worker was
    killed. Nothing is published then.
    """
    begun = time.monotonic()
    if not 0 <= validation < 1:
        raise ConfigError(f"validation is {validation}; it must lie in [0, 1). It is the part of documents held out.")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; it must be 1 or more. It is the number of processes.")
    number, tasks = task or (1, 1)
    if not 1 <= number <= tasks:
        raise ConfigError(f"task is {number}/{tasks}; it must be I/N, with I from 1 to N. It is the share to do.")
    folder, work = Path(out), Path(out) / PREPARE_WORK
    if task and STANDARD_INPUT in inputs:
        raise ConfigError("task is for inputs that every task can read, and standard input is not. Write it to a file.")
    reading = reading or Reading()
    found = find_inputs(inputs, reading)
    against = tuple(os.path.abspath(each) for each in dedup_against)
    for each in against:
        read_manifest(Path(each))
    workers = workers or usable_cores()
    recipe = Recipe(tokenizer.file, tokenizer.fingerprint, validation, reading, skip_bad)
    with among_others_in(folder, "a prepare or merge") if task else alone_in(folder, "another prepare"):
        if not task:
            finish_interrupted(folder)
        elif is_interrupted(folder):
            raise DataError(f"{folder}: a merge was interrupted there. Run `megacl data merge {folder}` first.")
        state = open_folder(folder, tokenizer, source, validation)
        source = state.source if state.number else source or folder.resolve().name
        _check_recordable(source=source, field=reading.field)
        found = keep_standard_input(found, work)
        command = Command(
            tasks=tasks,
            source=source,
            tokenizer_file=tokenizer.file_name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            validation=float(validation),  # an integer 0 would come back from the disk as another command
            settings={**reading.settings, **_dedup_settings(dedup, against)},
            skip_bad=skip_bad,
            block_bytes=block_bytes or block_bytes_of(found.files),
            dedup=dedup or bool(against),
            against=against,
            inputs=digest_of_files(found.files),
        )
        if not task:
            check_nothing_lost(command, found.files, work)
        done = _do_task(command, found, recipe, state, tokenizer, number, workers, progress)
        if task and not isinstance(done, Generation):
            return _report_of_task(*done, found.passed_over, time.monotonic() - begun)
        made = done if isinstance(done, Generation) else _publish(command, gather_tasks(command, work), state, workers)
        if not task:
            delete_folder(work)
    return _report_of_generation(made, state, found.passed_over, time.monotonic() - begun)


def merge(out: str | Path, *, workers: int | None = None) -> PrepareReport:
    """Publishes what the tasks of a command have done, as `prepare` without a task would have.

    Does nothing where no task waits, and reports the newest generation. workers: processes that write shards anew where
    documents are left out as duplicates or as removed earlier. DataError: a task is not done, an input changed since
    its task read it, and all that `prepare` finds at its end; nothing is published then.
    """
    begun = time.monotonic()
    folder, work = Path(out), Path(out) / PREPARE_WORK
    if not folder.is_dir():
        raise no_manifest(folder)
    with alone_in(folder, "a prepare"):
        finish_interrupted(folder)
        command, passed_over = read_command(work), tuple[str, ...]()
        if command is None:
            state = open_state(folder)
            made = state.generations[-1]
        else:
            tokenizer = load_tokenizer(work / COMMAND_FOLDER / command.tokenizer_file)
            state = open_folder(folder, tokenizer, command.source, command.validation)
            done = gather_tasks(command, work)
            passed_over = done.passed_over
            made = _publish(command, done, state, workers or usable_cores())
            delete_folder(work)
    return _report_of_generation(made, state, passed_over, time.monotonic() - begun)


def _dedup_settings(dedup: bool, against: Sequence[str]) -> dict[str, str | bool]:
    return {
        **({"dedup": True} if dedup or against else {}),
        **({"dedup_against": ", ".join(against)} if against else {}),
    }


def _check_recordable(**settings: str) -> None:
    for name, value in settings.items():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{name} is {value!r}, which is not UTF-8, so it cannot be recorded. Give another with --{name}."
            ) from None


def _report_of_generation(
    made: Generation, state: FolderState, passed_over: tuple[str, ...], seconds: float
) -> PrepareReport:
    """What a generation added to the one before it. state: the folder at that one or later."""
    zero = Totals(documents=0, tokens=0, text_bytes=0)
    before = state.generations[made.generation - 2] if made.generation > 1 else None
    train_before, held_out_before = (before.train, before.validation) if before else (zero, zero)
    train, held_out = made.train, made.validation
    return PrepareReport(
        generation=made.generation,
        documents=train.documents + held_out.documents - train_before.documents - held_out_before.documents,
        tokens=train.tokens + held_out.tokens - train_before.tokens - held_out_before.tokens,
        text_bytes=train.text_bytes + held_out.text_bytes - train_before.text_bytes - held_out_before.text_bytes,
        held_out=held_out.documents - held_out_before.documents,
        bad_lines=made.bad_lines,
        empty_documents=made.empty_documents,
        removed_documents=made.removed_documents,
        passed_over=passed_over,
        seconds=seconds,
    )


def _report_of_task(
    record: TaskRecord, shards: ShardList, passed_over: tuple[str, ...], seconds: float
) -> PrepareReport:
    train, held_out = shards.totals("train"), shards.totals("validation")
    return PrepareReport(
        generation=None,
        documents=train.documents + held_out.documents,
        tokens=train.tokens + held_out.tokens,
        text_bytes=train.text_bytes + held_out.text_bytes,
        held_out=held_out.documents,
        bad_lines=record.bad_lines,
        empty_documents=record.empty_documents,
        removed_documents=0,  # that is decided by the merge
        passed_over=passed_over,
        seconds=seconds,
    )


# ---------------------------------------------------------------------------------------------- the work


def _do_task(
    command: Command,
    found: Inputs,
    recipe: Recipe,
    state: FolderState,
    tokenizer: Tokenizer,
    number: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[TaskRecord, ShardList] | Generation:
    """Does a task, or finds it done; the generation that holds its inputs, if one does already."""
    work = state.folder / PREPARE_WORK
    portions = files_of_task(command, found.files, number)
    own = [file for portion in portions.values() for file in portion]
    total = sum(file.size for file in own)
    done = read_task(command, work, number)
    if done and not done[0].changed_file():
        begin_command(command, found.files, tokenizer, work)
        return done
    inputs = identify(own, workers)
    if made := made_already(state, inputs, [(file.name, file.size) for file in found.files], command):
        return made
    with disk_errors(work, "the work folder"):
        work.mkdir(exist_ok=True)
    begin_command(command, found.files, tokenizer, work)
    report = None if progress is None else lambda bytes_done: progress(bytes_done, total)
    with alone_in(folder_of_task(work, number, command.tasks), "the same task"):
        return run_task(command, portions, inputs, found.passed_over, recipe, work, number, workers, report)


def _publish(command: Command, done: AllTasks, state: FolderState, workers: int) -> Generation:
    """Publishes what all tasks have done, or finds the generation that holds it already."""
    work = state.folder / PREPARE_WORK
    inputs = [file.recorded for file in done.files]
    refuse_twice(inputs)
    if made := made_already(state, inputs, [(file.name, file.size) for file in inputs], command):
        return made
    if not len(done.shards):
        raise DataError(
            f"{done.files[0].name}{' and the other inputs' if len(inputs) > 1 else ''}: no documents in there "
            f"({done.bad_lines} bad lines, {done.empty_documents} documents without text). Check the files and --field."
        )
    keep, more = _kept(command, state, done.shards, work)
    losing, rewritten, origins = rewrite_shards(work, done.shards, keep, state.dtype, work, workers)
    staying = np.flatnonzero(~losing)
    order = np.argsort(np.concatenate([staying, origins]))
    added = ShardList.concat([done.shards.where(~losing), rewritten]).take(order)
    if not len(added):
        raise DataError(
            f"{state.folder}: all {len(keep)} documents of {done.files[0].name} and the other inputs are duplicates, "
            "or were removed from the folder earlier: there is nothing to add."
        )
    check_held_out(state, added)
    load_tokenizer(work / COMMAND_FOLDER / command.tokenizer_file).save(state.folder)
    return publish_generation(
        state,
        work,
        Change(
            made_by="prepare",
            settings={**command.settings, **more},
            added=added,
            inputs=inputs,
            bad_lines=done.bad_lines,
            empty_documents=done.empty_documents,
            removed_documents=int((~keep).sum()),
        ),
    )


def _kept(command: Command, state: FolderState, shards: ShardList, work: Path) -> tuple[Mask, dict[str, str]]:
    """Which of the shards' documents are published: all but those removed earlier and, with dedup, duplicates.

    Also what the generation records of the folders that were compared.
    """
    removed = read_removed(state.folder, state.generations).hashes
    if not command.dedup and not len(removed):
        return np.ones(int(shards.numbers("documents").sum()), np.bool_), {}
    hashes = hashes_of(work, shards, state.dtype)
    if not command.dedup:
        return ~is_known(hashes, [removed]), {}
    others = [open_state(Path(each)) for each in command.against]
    known = [hashes_of(each.folder, each.current(), each.dtype) for each in (state, *others)]
    numbers = ", ".join(str(each.number) for each in others)
    return ~is_repeated(hashes, [removed, *known]), {"dedup_against_generations": numbers} if others else {}
