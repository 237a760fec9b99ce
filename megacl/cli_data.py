"""The verbs of `megacl data`: look at prepared data and look after it. Each imports what it needs inside."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megacl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megacl.data.prepare import PrepareReport
    from megacl.data.remove import Matches, RemoveReport
    from megacl.saw import Sighting

Normalize = Literal["none", "nfc", "nfkc"]
TextForm = Literal["document", "paragraphs"]

data_app = typer.Typer(help="Look after prepared data.", no_args_is_help=True)


@data_app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A data folder.")],
    generation: Annotated[int | None, typer.Option(help="Only the shards of this one; by default of all.")] = None,
) -> None:
    """Compare every shard with its hash, those of earlier generations too."""
    from megacl.data.verify import verify_source

    problems = verify_source(folder, generation)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(2)
    print(f"{folder}: every shard is as its manifest says")


@data_app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A data folder.")],
    generation: Annotated[int | None, typer.Option(help="By default the newest.")] = None,
    documents: Annotated[int, typer.Option(min=0, help="How many documents to show the beginnings of.")] = 3,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """What is in a folder: generations, inputs, how long documents are and how some begin."""
    import dataclasses
    import json

    from megacl.data.overview import QUANTILES, look_into
    from megacl.log import table_text

    found = look_into(folder, generation, documents)
    if json_output:
        print(json.dumps(dataclasses.asdict(found), indent=1, ensure_ascii=False))
        return
    manifest, state, lengths = found.manifest, found.state, found.lengths
    tokenizer = manifest.tokenizer
    print(f"{folder}: source {manifest.source!r}, generation {state.generation} of {len(manifest.generations)}")
    print(
        f"tokenizer {tokenizer.file}, {tokenizer.vocab_size:,} ids ({manifest.dtype}), fingerprint "
        f"{tokenizer.fingerprint[:12]}; {manifest.validation:g} of the documents held out"
    )
    print(
        f"{state.shards:,} shards, {found.bytes_on_disk:,} bytes on disk"
        + (f"; {found.bytes_of_others:,} more of other generations" if found.bytes_of_others else "")
    )
    columns = ["generation", "made by", "documents", "held out", "tokens", "bytes of text", "bytes/token", "left out"]
    rows = []
    for each in manifest.generations:
        tokens = each.train.tokens + each.validation.tokens
        text_bytes = each.train.text_bytes + each.validation.text_bytes
        rows.append(
            [
                str(each.generation),
                f"{each.made_by}, purged" if each.purged_by else each.made_by,
                f"{each.train.documents + each.validation.documents:,}",
                f"{each.validation.documents:,}",
                f"{tokens:,}",
                f"{text_bytes:,}",
                f"{text_bytes / tokens:.2f}",
                f"{each.bad_lines + each.empty_documents + each.removed_documents:,}",
            ]
        )
    for line in table_text(columns, rows):
        print(line)
    which = "all documents" if lengths.whole else f"{lengths.documents:,} documents of 64 shards"
    marks = ", ".join(f"{q:.0%} {value:,}" for q, value in zip(QUANTILES, lengths.quantiles, strict=True))
    print(f"tokens a document, of {which}: {lengths.mean:,.1f} on average; {marks}")
    print(f"inputs: {len(found.inputs):,} files, {sum(each.size for each in found.inputs):,} bytes")
    for start in found.starts:
        print(f"  {start!r}")


@data_app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A data folder.")],
    out: Annotated[Path, typer.Option(help="PREFIX of the PREFIX.bin and PREFIX.idx to write.")],
    split: Annotated[Literal["train", "validation"], typer.Option(help="Which documents.")] = "train",
    generation: Annotated[int | None, typer.Option(help="By default the newest.")] = None,
) -> None:
    """Write a split as a Megatron dataset, .bin and .idx."""
    from megacl.data.export import export_megatron

    documents, tokens = export_megatron(folder, out, split=split, generation=generation)
    print(f"{out}.bin, {out}.idx: {documents:,} documents, {tokens:,} tokens")


@data_app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="The data folder that tasks were prepared into.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")] = None,
) -> None:
    """Publish what the tasks of `megacl prepare --task I/N` have done, once all are done."""
    from megacl.data.prepare import merge as merge_tasks

    print_prepared(out, merge_tasks(out, workers=workers))


@data_app.command()
def remove(
    folder: Annotated[Path, typer.Argument(help="A data folder.")],
    documents: Annotated[
        list[str] | None,
        typer.Option(help="Files or folders, as prepare reads them, that hold the documents. Repeatable."),
    ] = None,
    hashes: Annotated[Path | None, typer.Option(help="A file of the documents' hashes, 16 hex digits a line.")] = None,
    matching: Annotated[str | None, typer.Option(help="A regular expression that is found in their texts.")] = None,
    runs: Annotated[
        list[Path] | None, typer.Option(help="A folder of runs: say which of them saw the documents. Repeatable.")
    ] = None,
    purge: Annotated[
        bool, typer.Option("--purge", help="Delete the earlier generations' shards that hold them, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and stop.")] = False,
    field: Annotated[str, typer.Option(help="With --documents: as for prepare.")] = "text",
    encoding: Annotated[str, typer.Option(help="With --documents: as for prepare.")] = "utf-8",
    normalize: Annotated[Normalize, typer.Option(help="With --documents: as for prepare.")] = "none",
    text: Annotated[TextForm | None, typer.Option(help="With --documents: as for prepare.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Take documents out: a new generation without them, and who has seen them.

    They are named by their texts, their hashes, or a pattern, or several of these. Those named by text or hash do not
    come in by a later prepare, whether they are there now or not. Earlier generations keep them, unless --purge.
    """
    import numpy as np

    from megacl.data.forms.reading import Reading
    from megacl.data.generations import changing
    from megacl.data.remove import Wanted, find_documents, hashes_of_texts, read_hashes, remove_documents
    from megacl.data.workers import usable_cores

    if not (documents or hashes or matching is not None):
        raise ConfigError("name the documents to remove: --documents, --hashes or --matching.")
    named = [read_hashes(hashes)] if hashes else []
    if documents:
        named.append(hashes_of_texts(documents, Reading(field, encoding, normalize, text)))
    wanted = Wanted(np.unique(np.concatenate([np.empty(0, np.uint64), *named])), matching)
    workers = workers or usable_cores()
    with changing(folder) as state:
        matches = find_documents(state, wanted, workers)
        sightings: list[Sighting] = []
        problems: list[str] = []
        if runs:
            from megacl.saw import who_saw

            sightings, problems = who_saw(state, matches, runs)
        refused = purge and bool(problems) and not dry_run
        report = None if dry_run or refused else remove_documents(state, matches, purge=purge, workers=workers)
    if refused:
        raise DataError(
            f"{problems[0]} Nothing was removed, since after a purge nobody can tell. Mend or move the run, or purge "
            "without --runs."
        )
    if json_output:
        print(_removal_json(matches, report, sightings, problems))
        return
    print(
        f"{folder}: {matches.documents:,} documents of generation {state.number} ({matches.held_out:,} held out), "
        f"{matches.tokens:,} tokens, {matches.text_bytes:,} bytes of text; {len(matches.hashes):,} different ones over "
        f"all generations, and {len(matches.absent):,} that are in none"
    )
    if runs:
        _print_sightings(sightings, problems)
    _print_removed(report)


def _removal_json(
    matches: "Matches", report: "RemoveReport | None", sightings: "Sequence[Sighting]", problems: Sequence[str]
) -> str:
    import dataclasses
    import json

    tree = {
        "documents": matches.documents,
        "held_out": matches.held_out,
        "tokens": matches.tokens,
        "text_bytes": matches.text_bytes,
        "hashes": [f"{value:016x}" for value in matches.hashes.tolist()],
        "absent": [f"{value:016x}" for value in matches.absent.tolist()],
        "removed": dataclasses.asdict(report) if report else None,
        "seen": [dataclasses.asdict(each) for each in sightings],
        "problems": problems,
    }
    return json.dumps(tree, indent=1, ensure_ascii=False)


def _print_removed(report: "RemoveReport | None") -> None:
    if report is None or report.generation is None:
        print("nothing was changed")
        return
    print(f"generation {report.generation} is without them; {report.recorded:,} hashes more that never come in again")
    if report.unreadable:
        lost = ", ".join(map(str, report.unreadable))
        print(f"deleted {report.files:,} shards; generations that cannot be read any more: {lost}")


def _print_sightings(sightings: "Sequence[Sighting]", problems: Sequence[str]) -> None:
    from megacl.log import table_text

    if not sightings:
        print("no run there saw them")
    columns = [
        "run",
        "phase",
        "of run",
        "first at step",
        "samples",
        "documents",
        "checkpoints that hold them",
        "before",
    ]
    rows = [
        [
            each.run,
            each.phase,
            each.phase_run,
            f"{each.first_step:,}",
            f"{each.samples:,}",
            f"{each.documents:,}",
            " ".join(each.holding) or "none",
            " ".join(each.before) or "none",
        ]
        for each in sightings
    ]
    for line in table_text(columns, rows) if rows else ():
        print(line)
    for problem in problems:
        print(problem)


@data_app.command()
def dedup(
    folder: Annotated[Path, typer.Argument(help="A data folder.")],
    near: Annotated[
        float | None, typer.Option(help="Documents are duplicates that share this part of their five-word runs.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Documents are duplicates that have the same text.")] = False,
    against: Annotated[
        list[Path] | None, typer.Option(help="A folder whose held-out documents must not be trained on. Repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many would go, and stop.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")] = None,
) -> None:
    """Take duplicates out: a new generation in which no training document repeats another, or a held-out one."""
    from megacl.data.dedup import dedup_documents
    from megacl.data.generations import changing
    from megacl.data.workers import usable_cores

    with changing(folder) as state:
        report = dedup_documents(
            state, near=near, exact=exact, against=against or (), workers=workers or usable_cores(), dry_run=dry_run
        )
    found = report.train + report.held_out
    print(f"{folder}: {found:,} duplicates ({report.held_out:,} of them held out) among {report.of:,} documents")
    print(f"generation {report.generation} is without them" if report.generation else "nothing was changed")


@data_app.command()
def plan(
    config: Annotated[list[str], typer.Argument(help="CONFIG.yaml... and section.key=value..., as `megacl train`.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What each phase of a run reads and replays: tokens, shares, epochs, and what runs out when."""
    import dataclasses
    import json

    from megacl.log import table_text
    from megacl.plan import phase_line, plan_data
    from megacl.starting import load_run

    run = load_run(config)
    of_the_run, phases = plan_data(run)
    if json_output:
        trees = [
            {
                "phase": phase.record.name,
                "done": phase.done,
                "steps": phase.record.budget_steps,
                "tokens": phase.record.tokens,
                "readings": [dataclasses.asdict(reading) for reading in phase.readings],
                "packed": phase.packed,
                "notices": phase.notices,
            }
            for phase in phases
        ]
        print(json.dumps({"notices": of_the_run, "phases": trees}, indent=1, ensure_ascii=False))
        return
    for line in of_the_run:
        print(f"warning: {line}")
    for index, phase in enumerate(phases):
        print(phase_line(run, index, phase.record.budget_steps, done=phase.done))
        rows = [
            [
                reading.name if reading.kind == "source" else f"{reading.kind} {reading.name}",
                f"{reading.tokens:,}",
                f"{reading.share:.2%}",
                f"{reading.epochs:.2f}",
                f"step {reading.runs_out:,}" if reading.runs_out else "",
            ]
            for reading in phase.readings
        ]
        for line in table_text(["reads", "tokens", "share", "times by then", "runs out"], rows):
            print(f"  {line}")
        for line in phase.packed:
            print(f"  {line}")
        for line in phase.notices:
            print(f"  warning: {line}")


@data_app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    steps: Annotated[str, typer.Option(help="Optimizer steps of the run, A:B, both included, or A alone.")],
    limit: Annotated[int, typer.Option(min=1, help="How many samples to show.")] = 16,
    json_output: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """The text that a run read in some of its steps: where a loss jumped, say."""
    import dataclasses
    import itertools
    import json
    import re
    import sys

    from megacl.history import samples_of_steps

    match = re.fullmatch(r"(\d+)(?::(\d+))?", steps)
    if match is None:
        raise ConfigError(f"--steps is {steps!r}; it must be two steps of the run, 100:103, or one, 100.")
    samples = samples_of_steps(run, int(match[1]), int(match[2] or match[1]))
    for read in itertools.islice(samples, limit):
        if json_output:
            print(json.dumps(dataclasses.asdict(read), ensure_ascii=False))
            continue
        where = f"{read.source}, " + (f"packed row {read.row:,}" if read.start is None else f"token {read.start:,}")
        if read.replayed:
            where += f", replayed from {'phase ' + read.replayed_phase if read.replayed_phase else 'that source'}"
        if read.passed_over:
            where += ", passed over"
        print(f"--- step {read.step}, phase {read.phase}, sample {read.sample}: {where}")
        print("\n--- document ends\n".join(read.documents))
    if next(samples, None) is not None:
        print(f"these steps have more samples than --limit {limit}", file=sys.stderr)


def print_prepared(out: Path, report: "PrepareReport") -> None:
    """What a prepare, a task of one, or a merge has done."""
    what = f"generation {report.generation}" if report.generation else "done, and waits for the other tasks and a merge"
    print(
        f"{out}: {what}, {report.documents:,} documents ({report.held_out:,} held out), "
        f"{report.tokens:,} tokens, {report.text_bytes:,} bytes of text, {report.seconds:.1f} s"
    )
    if report.bad_lines or report.empty_documents:
        print(f"left out: {report.bad_lines:,} bad lines, {report.empty_documents:,} empty documents")
    if report.removed_documents:
        print(f"left out: {report.removed_documents:,} duplicates, or documents removed earlier")
    if passed_over := report.passed_over:
        what = "1 file of another kind" if len(passed_over) == 1 else f"{len(passed_over):,} files of other kinds"
        more = ", ..." if len(passed_over) > 3 else ""
        print(f"passed over: {what}, {', '.join(passed_over[:3])}{more}")
