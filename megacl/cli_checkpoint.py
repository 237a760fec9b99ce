"""The verbs of `megacl checkpoint`: look after the checkpoints of a run. Each imports what it needs inside."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megacl.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megacl.config_checkpoint import CheckpointConfig

checkpoint_app = typer.Typer(help="Look after a run's checkpoints.", no_args_is_help=True)


@checkpoint_app.command("list")
def list_(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """A run's checkpoints: where they stand, what they are named, and why each is kept. Nothing is verified."""
    from megacl.log import table_text
    from megacl.retention import standing_checkpoints

    settings = _settings_of(run)
    source = settings.keep_best.source if settings.keep_best else None
    columns = ["step", "phase", "tokens", "bytes", f"loss of {source}" if source else "mean loss", "names", "kept"]
    rows = [
        [
            str(each.step),
            each.phase or "?",
            "?" if each.tokens is None else f"{each.tokens:,}",
            f"{each.size:,}",
            "-" if each.loss is None else f"{each.loss:.4f}",
            ", ".join(each.names) or "-",
            "; ".join(each.why) or "no more: goes with the next save",
        ]
        for each in standing_checkpoints(run, settings)
    ]
    for line in table_text(columns, rows, align="rlrrrll"):
        print(line)


@checkpoint_app.command()
def verify(
    what: Annotated[
        list[str], typer.Argument(help="RUN (all its checkpoints), RUN@PHASE, RUN@STEP, RUN@NAME, folders.")
    ],
) -> None:
    """Compare every file of checkpoints with its hash, and name each that is damaged."""
    from megacl.checkpoint import named_checkpoint, step_folders, verify_checkpoint

    paths = [path for each in what for path in (step_folders(Path(each)) or [named_checkpoint(each)])]
    damaged = 0
    for path in paths:
        problems = verify_checkpoint(path)
        if not path.exists():
            print(f"{path}: was pruned meanwhile", flush=True)
            continue
        damaged += bool(problems)
        for problem in problems:
            print(problem, flush=True)
        if not problems:
            print(f"{path}: every file is as its manifest says", flush=True)
    if damaged:
        raise CheckpointError(
            f"{damaged} of {len(paths)} checkpoints are damaged; what of them is, is named above. A run passes over "
            "them; restore them from a copy, or delete their folders."
        )


@checkpoint_app.command()
def keep(
    checkpoint: Annotated[str, typer.Argument(help="RUN@STEP, RUN@PHASE, or RUN: its newest good one.")],
    name: Annotated[str, typer.Option("--as", help="Its name: RUN@NAME means it from now on.")],
) -> None:
    """Name a checkpoint, once it is verified: it stays for ever. It may have several names."""
    from megacl.retention import name_checkpoint

    run_dir, step = name_checkpoint(checkpoint, name, _warn)
    print(f"{run_dir}@{name} is step {step}, and stays")


@checkpoint_app.command()
def forget(checkpoint: Annotated[str, typer.Argument(help="RUN@NAME.")]) -> None:
    """Take a name back. The checkpoint goes when its run prunes, unless something else keeps it."""
    from megacl.checkpoint_names import take_name

    run, at, name = checkpoint.rpartition("@")
    if not at:
        raise ConfigError(f"{checkpoint!r} names no name; it must be RUN@NAME.")
    step = take_name(Path(run), name)
    print(f"{run}@{name} was step {step}; the name is free")


@checkpoint_app.command()
def prune(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    keep_last: Annotated[int | None, typer.Option(min=1, help="Instead of the run's checkpoint.keep_last.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Instead of checkpoint.keep_every, in steps.")] = None,
    keep_best: Annotated[int | None, typer.Option(min=1, help="Instead of checkpoint.keep_best: how many.")] = None,
    source: Annotated[str | None, typer.Option(help="With --keep-best: by this source's loss, not the mean.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and stop.")] = False,
) -> None:
    """Delete the checkpoints that no rule keeps, of a run that is not going on: one that is prunes itself."""
    from megacl.retention import prune_run

    settings = _changed(_settings_of(run), keep_last, keep_every, keep_best, source)
    gone = prune_run(run, settings, _warn, dry_run=dry_run)
    for path, size in gone:
        print(f"{'would delete' if dry_run else 'deleted'} {path}, {size:,} bytes")
    print(f"{run}: {len(gone)} checkpoint(s), {sum(size for _, size in gone):,} bytes")


@checkpoint_app.command()
def diff(
    a: Annotated[str, typer.Argument(help="RUN, RUN@PHASE, RUN@STEP, RUN@NAME or a checkpoint's folder.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
) -> None:
    """How two checkpoints differ: settings, state, history, and tensors, by the largest difference of each kind."""
    from megacl.checkpoint import find_checkpoint, open_checkpoint
    from megacl.checkpoint_diff import difference

    for line in difference(*(open_checkpoint(find_checkpoint(each, _warn)) for each in (a, b))):
        print(line, flush=True)


@checkpoint_app.command()
def export(
    model: Annotated[str, typer.Argument(help="RUN, RUN@PHASE, RUN@STEP, RUN@NAME or a checkpoint's folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
) -> None:
    """Copy a checkpoint's weights without its optimizer's state: a checkpoint, a third as large, that stands alone."""
    from megacl.checkpoint import find_checkpoint, open_checkpoint
    from megacl.checkpoint_export import export_weights
    from megacl.retention import size_of

    checkpoint = open_checkpoint(find_checkpoint(model, _warn, moments=False))
    export_weights(checkpoint, out)
    print(f"{out}: the weights of {checkpoint.path}, {size_of(out):,} bytes of {size_of(checkpoint.path):,}")


def _settings_of(run_dir: Path) -> "CheckpointConfig":
    """What a run directory's configuration says of its checkpoints."""
    from megacl.configfile import load

    path = run_dir / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{run_dir}: no run directory, it has no config.yaml.")
    return load([str(path)]).checkpoint


def _changed(
    settings: "CheckpointConfig", last: int | None, every: int | None, best: int | None, source: str | None
) -> "CheckpointConfig":
    from megacl.config_checkpoint import KeepBestConfig

    if source is not None and best is None:
        raise ConfigError("--source says by which loss the best are chosen; give --keep-best too.")
    settings = dataclasses.replace(
        settings,
        keep_last=last or settings.keep_last,
        keep_every=every or settings.keep_every,
        keep_best=KeepBestConfig(source=source, keep=best) if best else settings.keep_best,
    )
    if settings.keep_last is None:
        raise ConfigError("the run's checkpoint.keep_last is null, which keeps everything; give --keep-last.")
    return settings


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
