"""The command line. Each verb imports what it needs inside, so that `megacl --help` answers at once.

Exit status: 0 done; 75 stopped by a signal, the same command goes on (EX_TEMPFAIL); 130 Ctrl-C where there was
nothing to save; 2 wrong input; 1 a run that diverged, data that cannot be reached for now, or a bug of ours, which
shows its traceback.
"""

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megacl.cli_checkpoint import checkpoint_app
from megacl.cli_convert import convert
from megacl.cli_data import Normalize, TextForm, data_app, print_prepared
from megacl.cli_slurm import cancel, job_end, logs, status, submit
from megacl.errors import CheckpointError, ConfigError, DataError, LaunchError, MegaclError

if TYPE_CHECKING:
    from megacl.checkpoint import Checkpoint
    from megacl.engine import Engine
    from megacl.parallel.ranks import Ranks
    from megacl.transfer import Matrix

app = typer.Typer(
    help="megacl updates a language model with new data, without it forgetting what it knew.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.command()(convert)
app.command()(submit)
app.command()(status)
app.command()(cancel)
app.command()(logs)
app.command("job-end", hidden=True)(job_end)

GO_ON_LATER = 75


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files of documents (.jsonl, .txt, also compressed; .parquet, .arrow, Megatron's .bin), folders of "
            "them, patterns in quotes, or - for standard input."
        ),
    ],
    tokenizer: Annotated[str, typer.Option(help="SentencePiece .model, Hugging Face tokenizer.json, or a folder.")],
    out: Annotated[Path, typer.Option(help="The data folder to make, or to add a generation to.")],
    source: Annotated[str | None, typer.Option(help="The source's name; by default the folder's.")] = None,
    validation: Annotated[float, typer.Option(help="The part of the documents that is held out.")] = 0.01,
    field: Annotated[str, typer.Option(help="The key or column of a document's text, or a path: meta.text.")] = "text",
    encoding: Annotated[str, typer.Option(help="The encoding of JSON lines and plain text.")] = "utf-8",
    normalize: Annotated[Normalize, typer.Option(help="Unicode's normal form to bring texts into.")] = "none",
    text: Annotated[
        TextForm | None,
        typer.Option(help="A .txt file is a document, or paragraphs are; of standard input too: plain text, not JSON."),
    ] = None,
    parse_control: Annotated[
        bool,
        typer.Option("--parse-control", help="Names of control tokens in a text become those tokens, but for EOS."),
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count broken lines and go on.")] = False,
    dedup: Annotated[bool, typer.Option("--dedup", help="Leave out documents that are there already.")] = False,
    dedup_against: Annotated[
        list[Path] | None, typer.Option(help="--dedup, and leave out what this data folder holds. Repeatable.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="I/N: do share I of N, here or elsewhere; then `megacl data merge OUT`.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.")] = None,
) -> None:
    """Turn raw documents into tokenized shards and a manifest; goes on where it was interrupted.

    On many machines that share a file system: the same command with --task 1/N to N/N, all at once if you like, then
    `megacl data merge OUT`. A chain of `megacl submit` does this as a job array.
    """
    from rich.console import Console
    from rich.progress import Progress

    from megacl.data.forms.reading import Reading
    from megacl.data.prepare import prepare as prepare_documents
    from megacl.data.tokenizer import load_tokenizer

    try:
        console = Console(stderr=True)
        with Progress(transient=True, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(f"preparing {out}", total=None)
            report = prepare_documents(
                inputs,
                tokenizer=load_tokenizer(tokenizer),
                out=out,
                source=source,
                validation=validation,
                reading=Reading(field, encoding, normalize, text, parse_control),
                skip_bad=skip_bad,
                dedup=dedup,
                dedup_against=dedup_against or (),
                task=_share(task) if task else None,
                workers=workers,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is left", file=sys.stderr)
        _leave(128 + signal.SIGINT)
    print_prepared(out, report)


def _share(task: str) -> tuple[int, int]:
    number, _, tasks = task.partition("/")
    if not (number.isdecimal() and tasks.isdecimal()):
        raise ConfigError(f"--task is {task!r}; it must be I/N, such as 3/8: share 3 of 8.")
    return int(number), int(tasks)


@app.command()
def train(
    config: Annotated[list[str], typer.Argument(help="CONFIG.yaml... merged left to right, then section.key=value...")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run would do, and stop.")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="With --dry-run: how many ranks there will be.")] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="With --dry-run: what they will compute on; by default what is here."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on where the run directory stands.")] = True,
    until_phase: Annotated[
        str | None, typer.Option(help="Leave off at the end of this phase; the next one may follow later.")
    ] = None,
) -> None:
    """Train a run: its phases one after another. The same command goes on after an interruption."""
    from megacl.starting import load_run

    run = load_run(config)
    if ranks is not None and not dry_run:
        raise ConfigError("--ranks goes with --dry-run; a run's ranks are those that torchrun or srun starts.")
    if device is not None and not dry_run:
        raise ConfigError("--device goes with --dry-run; a run computes on GPUs where there are some.")
    if dry_run and until_phase is not None:
        raise ConfigError("--dry-run plans the whole run; leave out --until-phase.")
    if dry_run:
        from megacl.plan import plan_text

        for line in plan_text(run, resume=resume, ranks=ranks, device=device):
            print(line)
        return
    from megacl.trainer import train as train_run

    if train_run(run, resume=resume, until_phase=until_phase) == "stopped":
        _leave(GO_ON_LATER)


@app.command()
def release(
    run: Annotated[str, typer.Argument(help="The trunk: RUN, RUN@PHASE, RUN@STEP, RUN@NAME or a checkpoint's folder.")],
    out: Annotated[Path, typer.Option(help="The run directory to make of the release.")],
    at: Annotated[int | None, typer.Option(min=0, help="The trunk's step to release; by default its newest.")] = None,
    anneal: Annotated[
        str | None, typer.Option(help="Train: lower the rate over so many tokens, 2e9, or 5% of what was seen.")
    ] = None,
    merge: Annotated[
        str | None, typer.Option(help="Train nothing: a weighted mean of checkpoints, last:N or STEP,STEP,...")
    ] = None,
    shape: Annotated[
        Literal["exponential", "linear", "cosine", "1-sqrt", "mean"] | None,
        typer.Option(help="How the rate falls; by default exponential to anneal, linear to merge; mean merges only."),
    ] = None,
    min_lr: Annotated[
        float | None, typer.Option(help="The rate it falls to; by default the trunk's min_lr, or a tenth of its rate.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
) -> None:
    """A release off a trunk whose rate is constant: annealed in a run of its own, or merged from its checkpoints.

    The trunk stays as it is. The same command goes on after an interruption.
    """
    if (anneal is None) == (merge is None):
        raise ConfigError("a release takes either --anneal TOKENS or --merge last:N; give one of them.")
    if merge is not None:
        from megacl.release_merge import already, choose, held_merge
        from megacl.release_merge import merge as merge_checkpoints

        decay = shape or "linear"
        if dry_run:
            held = held_merge(run, merge, step=at, shape=decay, min_lr=min_lr, out=out)
            if held is not None:
                print(f"{held.path}: {already(held)}")
                return
            for line in choose(run, merge, step=at, shape=decay, min_lr=min_lr, warn=_warn).lines():
                print(line)
        else:
            merge_checkpoints(run, merge, step=at, shape=decay, min_lr=min_lr, out=out, warn=_warn)
        return
    if shape == "mean":
        raise ConfigError("--shape is mean, which is no way to lower a rate; it goes with --merge.")
    from megacl.release import anneal_config

    config = anneal_config(
        run, anneal=str(anneal), out=out, step=at, shape=shape or "exponential", min_lr=min_lr, warn=_warn
    )
    if dry_run:
        from megacl.plan import plan_text

        for line in plan_text(config):
            print(line)
        return
    from megacl.trainer import train as train_run

    if train_run(config) == "stopped":
        _leave(GO_ON_LATER)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="RUN, RUN@PHASE, RUN@STEP, RUN@NAME or a checkpoint's folder.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Data folders; by default all that the model has seen.")
    ] = None,
    seq_length: Annotated[int | None, typer.Option(min=1, help="Tokens of context; by default as in training.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="A run to compare with, by what both recorded: no model is loaded.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="A file to write the JSON to, whole or not at all.")] = None,
) -> None:
    """Loss, perplexity and bits per byte on held-out documents, per source; what was learned and forgotten so far."""
    import json

    from megacl.evaluate import evaluate_sources, open_named, sources_of
    from megacl.log import table_text, without_nan
    from megacl.publish import disk_errors, publish_text
    from megacl.resume import shard_cache

    if out is not None and (out.is_dir() or not all(each.is_dir() for each in out.parents if each.exists())):
        raise ConfigError(f"--out is {out}, where no file can be written; name one in a folder, such as english.json.")
    if against is not None:
        if data or seq_length or out:
            raise ConfigError("--against compares what two runs recorded; leave out --data, --seq-length and --out.")
        _compare(Path(model), against, json_output=json_output)
        return
    with _open_model(model) as (checkpoint, engine, ranks):
        cache = shard_cache(checkpoint.config)
        if data:
            sources = open_named(data, checkpoint.tokenizer(), cache)
        else:
            sources, problems = sources_of(checkpoint.lineage, {}, cache=cache)
            for problem in problems:
                _warn(f"not evaluated: {problem}")
        results = evaluate_sources(
            engine,
            ranks,
            sources,
            seq_length=seq_length or checkpoint.config.seq_length,
            micro_batch_size=checkpoint.config.evaluation.micro_batch_size,
        )
        if not results:
            raise DataError(
                f"{model}: there are no held-out documents to evaluate on; name data folders that have some."
            )
        if ranks.rank != 0:
            return
        matrices = _matrices(checkpoint)
        found = {
            "checkpoint": str(checkpoint.path),
            "tokens": checkpoint.lineage.tokens,
            "sources": {name: result.record() for name, result in results.items()},
            "matrix": {matrix.unit: matrix.record() for matrix in matrices},
        }
        text = json.dumps(without_nan(found), indent=1)
        if out is not None:
            with disk_errors(out, "the evaluation"):
                out.parent.mkdir(parents=True, exist_ok=True)
            publish_text(out, text + "\n", "the evaluation")
        if json_output:
            print(text)
            return
        print(f"{checkpoint.path}: {checkpoint.lineage.tokens:,} tokens seen")
        rows = [
            [name, f"{r.loss:.4f}", f"{r.perplexity:.2f}", f"{r.bits_per_byte:.4f}", f"{r.tokens:,}"]
            for name, r in results.items()
        ]
        for line in table_text(["source", "loss", "perplexity", "bits/byte", "tokens"], rows):
            print(line)
        for matrix in matrices:
            _print_matrix(matrix)


def _compare(run_dir: Path, other_dir: Path, *, json_output: bool) -> None:
    import dataclasses
    import json

    from megacl.comparison import compare
    from megacl.log import without_nan

    comparison = compare(run_dir, other_dir, _warn)
    if json_output:
        print(json.dumps(without_nan(dataclasses.asdict(comparison)), indent=1))
        return
    for line in comparison.lines():
        print(line)


def _matrices(checkpoint: "Checkpoint") -> "list[Matrix]":
    """What the checkpoint's run recorded up to it, in both units; none where it does not stand in a run directory."""
    from megacl.heldout import UNITS, read_evaluations
    from megacl.transfer import matrix_of

    run_dir = checkpoint.path.parent.parent
    if not (run_dir / "metrics.jsonl").is_file():
        return []
    way = read_evaluations(run_dir, until=checkpoint.state.step, warn=_warn)
    return [matrix_of(way, checkpoint.lineage, unit=unit) for unit in UNITS if way]


def _print_matrix(matrix: "Matrix") -> None:
    from megacl.log import table_text
    from megacl.transfer import matrix_table

    def write(value: float | None, signed: bool) -> str:
        return "-" if value is None else format(value, "+.4f" if signed else ".4f")

    unit = "nats a token" if matrix.unit == "loss" else "bits per byte"
    print(f"\nheld-out loss while it was trained, {unit}; *: the phase read that source")
    for line in table_text(*matrix_table(matrix, write, matrix.sources)):
        print(line)


@app.command()
def lineage(
    model: Annotated[str, typer.Argument(help="RUN, RUN@PHASE, RUN@STEP, RUN@NAME or a checkpoint's folder.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check it instead: ids, every byte of its sources, other checkpoints.")
    ] = False,
) -> None:
    """What a model has seen: its phases, and the branches and merges between them."""
    from megacl.checkpoint import find_checkpoint
    from megacl.lineage import load_lineage
    from megacl.lineage_text import describe

    if verify:
        if json_output:
            raise ConfigError("--verify says what holds line by line, and has no JSON; leave out --json.")
        _verify_lineage(model)
        return
    found = load_lineage(find_checkpoint(model, _warn))
    print(found.dump().rstrip() if json_output else describe(found))


def _verify_lineage(model: str) -> None:
    from collections import Counter

    from megacl.audit import audit

    states: Counter[str] = Counter()
    for finding in audit(model):
        print(finding, flush=True)
        states[finding.state] += 1
    if bad := states["missing"] + states["changed"]:
        raise CheckpointError(
            f"{model}: of {states.total()} things looked at, {bad} are missing or changed; each is named above."
        )
    unchecked = f", and {states['unchecked']} could not be checked" if states["unchecked"] else ""
    print(f"{model}: {states['ok']} things hold{unchecked}")


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="RUN, RUN@PHASE, RUN@STEP, RUN@NAME or a checkpoint's folder.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    tokens: Annotated[int, typer.Option(help="How many tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the k likeliest only.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="The same seed gives the same text.")] = 0,
) -> None:
    """Text out of any checkpoint."""
    from megacl.sample import sample as sample_text

    if any(0xD800 <= ord(character) <= 0xDFFF for character in prompt):
        raise ConfigError("--prompt is not text in the terminal's encoding; give it as UTF-8.")
    with _open_model(model) as (checkpoint, engine, ranks):
        text = sample_text(
            engine,
            checkpoint.tokenizer(),
            prompt,
            tokens=tokens,
            seq_length=checkpoint.config.seq_length,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
        if ranks.rank == 0:
            print(prompt + text)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[Path, typer.Option(help="The page to write.")],
) -> None:
    """One self-contained HTML page about one or several runs."""
    _need_plotly("a report")
    from megacl.report import save_report

    save_report(runs, out)
    print(f"{out}: open it in a browser")


@app.command()
def study(
    study: Annotated[str, typer.Argument(help="STUDY.yaml: arms, seeds, bars.")],
    out: Annotated[Path, typer.Option(help="The study's folder: its runs, its results, its page.")],
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; by default one a core, a GPU, or a SLURM node.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="One part, as SLURM's jobs do them: `plan`, then a run by its name, then `results`."),
    ] = None,
) -> None:
    """Train and compare the arms of a study, and say which of its bars are held. The same command goes on."""
    _need_plotly("a study's page")
    from megacl.study import run_part, run_study

    if only is not None and jobs is not None:
        raise ConfigError("--only does one part, and --jobs says how many runs at a time; leave one of them out.")
    if (run_study(study, out, jobs=jobs) if only is None else run_part(study, out, only)) == "stopped":
        _leave(GO_ON_LATER)


@contextlib.contextmanager
def _open_model(reference: str) -> "Iterator[tuple[Checkpoint, Engine, Ranks]]":
    """A checkpoint and an engine that holds its weights, while the ranks are together."""
    from megacl.checkpoint import find_checkpoint, open_checkpoint
    from megacl.inference import engine_of
    from megacl.parallel.ranks import start_ranks, stop_ranks

    checkpoint = open_checkpoint(find_checkpoint(reference, _warn))
    engine = checkpoint.config.engine
    ranks = start_ranks(timeout=engine.timeout, rendezvous_timeout=engine.rendezvous_timeout)
    try:
        yield checkpoint, *engine_of(checkpoint, ranks)
    finally:
        stop_ranks()


def _need_plotly(what: str) -> None:
    if importlib.util.find_spec("plotly") is None:
        raise LaunchError(f"{what} needs plotly, which is not installed; run `pip install 'megacl[report]'`.")


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _leave(status: int) -> None:
    raise typer.Exit(status)


def main() -> None:
    """Runs the command line: an error that the user can put right is one line and its exit status."""
    try:
        app()
    except MegaclError as error:
        first = os.environ.get("RANK", "0") == "0" and os.environ.get("SLURM_PROCID", "0") == "0"
        if first or not error.on_every_rank:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
