"""Verbs of the command line that speak with SLURM: submit, status, cancel, logs; and job-end, which scripts ask."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from megacl.errors import ConfigError


def submit(
    config: Annotated[
        list[str],
        typer.Argument(help="CONFIG.yaml... merged left to right, then section.key=value..., cluster.key=value..."),
    ],
    cluster: Annotated[str, typer.Option(help="A cluster file, or the name of one that comes with megacl.")],
    name: Annotated[str | None, typer.Option(help="What squeue shows; by default the run directory's name.")] = None,
    nodes: Annotated[str | None, typer.Option(help="A number, or FROM-TO; by default the cluster file's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Of a study: its folder.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Of a study: how many runs train at a time.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the script, and stop.")] = False,
) -> None:
    """Queue a run on a SLURM cluster: it goes through time limits and failures by itself until it is done.

    In place of a run's configuration, CHAIN.yaml queues a chain's steps, and STUDY.yaml --out DIR a study's runs.
    """
    overrides = [] if nodes is None else [f"cluster.nodes={nodes}"]
    what = _what_it_holds(config[0])
    if (out is not None or at_once is not None) and what != "study":
        raise ConfigError("--out and --at-once are a study's; leave them out.")
    if what != "run":
        if name is not None:
            raise ConfigError(f"--name is a run's; the jobs of a {what} have their names from its file.")
        _submit_several(what, [*config, *overrides], cluster, out, at_once, dry_run=dry_run)
        return
    from megacl.slurm.check import plan_lines
    from megacl.slurm.render import render_script
    from megacl.slurm.submit import read_submission
    from megacl.slurm.submit import submit as submit_run

    asked = read_submission([*config, *overrides], cluster=cluster, name=name)
    for line in plan_lines(asked.config, asked.cluster, only_plan=dry_run):
        print(line)
    script = render_script(asked.next_job(), asked.cluster)
    if dry_run:
        print(f"\n{script}", end="")
        return
    job, job_id = submit_run(asked)
    run_dir = asked.config.run_dir
    print(f"job {job_id}: {job.script}")
    print(f"log: {job.log_of(job_id)}")
    print(f"megacl status {shlex.quote(run_dir)}    # how it stands; also `megacl logs`, `megacl cancel`")


def _what_it_holds(file: str) -> Literal["run", "chain", "study"]:
    """What a file is of, by its settings; a file that cannot be read is left to who reads it."""
    from megacl.configfile import load_tree

    if "=" in file and not Path(file).is_file():
        return "run"
    tree = load_tree([file])
    return "chain" if "steps" in tree else "study" if "arms" in tree else "run"


def _submit_several(
    what: Literal["chain", "study"],
    arguments: list[str],
    cluster: str,
    out: Path | None,
    at_once: int | None,
    *,
    dry_run: bool,
) -> None:
    """Queues the jobs of a chain or a study."""
    from megacl.slurm.chain_submit import read_chain
    from megacl.slurm.graph import queue_all
    from megacl.slurm.study_submit import read_study

    file, *more = arguments
    for each in more:
        if not each.startswith("cluster.") or "=" not in each:
            raise ConfigError(f"{each}: behind a {what}'s file, only cluster.KEY=VALUE can be given.")
    overrides = [each.removeprefix("cluster.") for each in more]
    if what == "chain":
        asked = read_chain(file, cluster=cluster, overrides=overrides)
    elif out is None:
        raise ConfigError("a study needs --out, the folder of its runs and results.")
    else:
        asked = read_study(file, out, cluster=cluster, at_once=at_once, overrides=overrides)
    if dry_run:
        for script in asked.scripts():
            print(f"{script}\n")
    for line in asked.lines():
        print(line)
    if not asked.left:
        print(f"{asked.folder}: all is done already")
    elif not dry_run:
        for name, (_, job_id) in queue_all(asked.folder, asked.left, asked.record).items():
            print(f"{name}: job {job_id}")
        print(f"megacl status {shlex.quote(str(asked.folder))}    # how they stand; also `megacl cancel`")


def status(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories; a chain's or a study's folder.")
    ],
    json_output: Annotated[bool, typer.Option("--json", help="Print a JSON list, an object a run or chain.")] = False,
) -> None:
    """What runs are doing: step, loss, speed, restarts, time left, and why one waits or how it ended."""
    import json

    from megacl.log import without_nan
    from megacl.slurm.chain_status import chain_lines, chain_tree, is_chain
    from megacl.slurm.status import read_status, status_text

    if json_output:
        trees = [chain_tree(run) if is_chain(run) else read_status(run).tree() for run in runs]
        print(json.dumps(without_nan(trees), indent=1))
        return
    for run in runs:
        lines = chain_lines(chain_tree(run)) if is_chain(run) else status_text(read_status(run))
        print("\n".join(lines))


def cancel(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories; a chain's or a study's folder.")
    ],
) -> None:
    """End a run's jobs on the cluster: what trains saves first, and nothing starts it again but a new submission."""
    from functools import partial

    from megacl.slurm.cancel import cancel_run
    from megacl.slurm.chain_status import cancel_chain, is_chain

    for run in runs:
        try:
            (cancel_chain if is_chain(run) else cancel_run)(run, partial(print, flush=True))
        except KeyboardInterrupt:
            print("not waited for: it saves and ends by itself", flush=True)


def logs(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    rank: Annotated[int | None, typer.Option(min=0, help="This rank's lines alone.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="One attempt's lines, by its number.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes, until the run has ended.")] = False,
) -> None:
    """What a run's jobs have written, of all ranks or of one."""
    from megacl.slurm.jobs import check_run
    from megacl.slurm.logs import follow_lines, read_lines
    from megacl.slurm.status import read_status

    if follow and attempt is not None:
        raise ConfigError("--follow goes on with what comes; leave out --attempt.")
    check_run(run)
    lines = (
        follow_lines(run, rank=rank, over=lambda: read_status(run).state in ("ended", "lost"))
        if follow
        else read_lines(run, rank=rank, attempt=attempt)
    )
    try:
        for line in lines:
            print(line, end="", flush=follow)
    except KeyboardInterrupt:
        return


def job_end(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    status: Annotated[int, typer.Option(help="The exit status of srun or torchrun.")],
    since: Annotated[float, typer.Option(help="When it was started, seconds since 1970.")],
    max_restarts: Annotated[int, typer.Option(min=0, help="Restarts in a row without a new step saved.")] = 5,
    first_wait: Annotated[int, typer.Option(min=0, help="Seconds before the first of these; it doubles.")] = 30,
) -> None:
    """What a job script asks once its ranks have ended: end STATUS, again SECONDS or requeue SECONDS [NODES].

    Or fenced STATUS: the run, or the job, is another start's by now.
    """
    from megacl.errors import FencedError
    from megacl.fencing import who_has_taken
    from megacl.slurm.job_end import end_attempt

    if why := who_has_taken(run, since=since):
        print(f"fenced: {why}", file=sys.stderr)
        print(f"fenced {FencedError.exit_status}")
        return
    outcome, decision = end_attempt(run, status=status, since=since, max_restarts=max_restarts, first_wait=first_wait)
    print(f"{outcome.outcome}: {decision.why}", file=sys.stderr)
    print(decision)
