"""The command line. Each verb imports what it needs inside, so that `megacl --help` answers at once.

Exit status: 0 done; 75 stopped by a signal, the same command goes on (EX_TEMPFAIL); 2 wrong input; 1 a run that
diverged, or a bug of ours, which shows its traceback.
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

from megacl.cli_data import Normalize, TextForm, data_app, print_prepared
from megacl.errors import ConfigError, DataError, LaunchError, MegaclError

if TYPE_CHECKING:
    from megacl.checkpoint import Checkpoint
    from megacl.engine import Engine
    from megacl.parallel.ranks import Ranks

app = typer.Typer(
    help="megacl updates a language model with new data, without it forgetting what it knew.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")

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
    `megacl data merge OUT`. slurm/prepare.sbatch.j2 is a job array that does this.
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
) -> None:
    """Train a run: its phases one after another. The same command goes on after an interruption."""
    from megacl.configfile import load_arguments

    run = load_arguments(config)
    if ranks is not None and not dry_run:
        raise ConfigError("--ranks goes with --dry-run; a run's ranks are those that torchrun or srun starts.")
    if device is not None and not dry_run:
        raise ConfigError("--device goes with --dry-run; a run computes on GPUs where there are some.")
    if dry_run:
        from megacl.plan import plan_text

        for line in plan_text(run, resume=resume, ranks=ranks, device=device):
            print(line)
        return
    from megacl.trainer import train as train_run

    if train_run(run, resume=resume) == "stopped":
        _leave(GO_ON_LATER)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="RUN, RUN@PHASE, RUN@STEP or a checkpoint's folder.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Data folders; by default all that the model has seen.")
    ] = None,
    seq_length: Annotated[int | None, typer.Option(min=1, help="Tokens of context; by default as in training.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Loss, perplexity and bits per byte on held-out documents, per source; for a run also what it forgot."""
    import json

    from megacl.evaluate import evaluate_sources, open_named, sources_of
    from megacl.log import table_text
    from megacl.resume import shard_cache

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
        if json_output:
            print(json.dumps({name: result.record() for name, result in results.items()}, indent=1))
            return
        print(f"{checkpoint.path}: {checkpoint.lineage.tokens:,} tokens seen")
        rows = [
            [name, f"{r.loss:.4f}", f"{r.perplexity:.2f}", f"{r.bits_per_byte:.4f}", f"{r.tokens:,}"]
            for name, r in results.items()
        ]
        for line in table_text(["source", "loss", "perplexity", "bits/byte", "tokens"], rows):
            print(line)
        _print_forgetting(Path(model))


def _print_forgetting(run_dir: Path) -> None:
    from megacl.evaluate import forgetting_table
    from megacl.log import read_metrics, table_text

    evaluations = [r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "evaluation"]
    table = forgetting_table(evaluations)
    if not table:
        return
    labels = [label for label, _ in max((row.losses for row in table), key=len)]
    print("\nheld-out loss where the run began and at each phase's end")
    rows = [
        [
            row.source,
            *(f"{dict(row.losses)[label]:.4f}" if label in dict(row.losses) else "-" for label in labels),
            f"{row.forgetting:+.4f}",
            f"{row.gain:+.4f}",
        ]
        for row in table
    ]
    for line in table_text(["source", *labels, "forgetting", "gain"], rows):
        print(line)


@app.command()
def lineage(
    model: Annotated[str, typer.Argument(help="RUN, RUN@PHASE, RUN@STEP or a checkpoint's folder.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """What a model has seen, phase by phase."""
    from megacl.checkpoint import find_checkpoint
    from megacl.lineage import describe, load_lineage

    found = load_lineage(find_checkpoint(model, _warn))
    print(found.dump().rstrip() if json_output else describe(found))


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="RUN, RUN@PHASE, RUN@STEP or a checkpoint's folder.")],
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
    if importlib.util.find_spec("plotly") is None:
        raise LaunchError("a report needs plotly, which is not installed; run `pip install 'megacl[report]'`.")
    from megacl.report import save_report

    save_report(runs, out)
    print(f"{out}: open it in a browser")


@contextlib.contextmanager
def _open_model(reference: str) -> "Iterator[tuple[Checkpoint, Engine, Ranks]]":
    """A checkpoint and an engine that holds its weights: on one rank the native one, whatever trained it.

    On several they share the layers as in training, and sequences are dealt out whole. It computes as in training on a
    GPU, and in fp32 without compiling on a CPU.
    """
    import dataclasses

    from megacl.checkpoint import find_checkpoint, open_checkpoint
    from megacl.engine import build_engine, device_here
    from megacl.model.gpt import build_model
    from megacl.parallel.ranks import start_ranks, stop_ranks

    checkpoint = open_checkpoint(find_checkpoint(reference, _warn))
    config = checkpoint.config
    ranks = start_ranks(timeout=config.engine.timeout)
    try:
        several = ranks.world_size > 1
        how = dataclasses.replace(
            config.engine,
            kind=config.engine.kind if several else "native",
            tensor_parallel=config.engine.tensor_parallel if several else 1,
            sequence_parallel=1,
            kernels={},  # they were named for the machine that trained
        )
        if device_here() == "cpu":  # nor do 16 bits and compiling pay on a CPU
            how = dataclasses.replace(how, precision="fp32", compile=False)
        ranks = ranks.arrange(tensor_parallel=how.tensor_parallel, sequence_parallel=1)
        model = build_model(config.model, seed=config.seed, device="meta")
        if config.boundaries == "attention":
            model.document_end = checkpoint.tokenizer().eos_id
        engine = build_engine(
            model,
            engine=how,
            optimizer=config.optimizer,
            ranks=ranks,
        )
        load = checkpoint.load_weights()
        engine.import_state(lambda name: {"weight": load(name)}, optimizer_step=0, loss_scale=None)
        yield checkpoint, engine, ranks
    finally:
        stop_ranks()


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
