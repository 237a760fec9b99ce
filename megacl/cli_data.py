"""The verbs of `megacl data`: look at prepared data and look after it. Each imports what it needs inside."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megacl.data.prepare import PrepareReport

data_app = typer.Typer(help="Look after prepared data.", no_args_is_help=True)


@data_app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A data folder.")]) -> None:
    """Compare every shard with its hash."""
    from megacl.data.verify import verify_source

    problems = verify_source(folder)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(2)
    print(f"{folder}: every shard is as its manifest says")


@data_app.command()
def merge(out: Annotated[Path, typer.Argument(help="The data folder that tasks were prepared into.")]) -> None:
    """Publish what the tasks of `megacl prepare --task I/N` have done, once all are done."""
    from megacl.data.prepare import merge as merge_tasks

    print_prepared(out, merge_tasks(out))


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
    if report.passed_over:
        print(f"passed over: {len(report.passed_over):,} files of other kinds, {', '.join(report.passed_over[:3])} ...")
