"""A run: its phases one after another, logged, evaluated, saved, and stopped when it is told to.

    outcome = train(config)        # on every rank; "done", or "stopped" where a signal asked for it

The run directory is a contract that all readers share (docs/formats.md): config.yaml (resolved), metrics.jsonl,
lineage.json, checkpoints/step-N/. Running the same configuration again goes on where the newest good checkpoint stands,
and the result is the one of an undisturbed run.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from megacl.checkpoint import RunState, newest_checkpoint
from megacl.config import RunConfig
from megacl.config_phase import PhaseConfig, nearest
from megacl.configfile import dump
from megacl.data.loader import Batch, Loader
from megacl.data.provide import missing_sources, provide_sources
from megacl.data.source import Source
from megacl.data.store import wanted_until
from megacl.data.stream import PhaseStream
from megacl.ending import Ending
from megacl.engine import Engine, build_engine, check_engine, device_here
from megacl.errors import ConfigError, DataError, DivergedError, StoppedError
from megacl.evaluate import EvaluationStopped, evaluate_sources, sources_of
from megacl.fencing import Fence, hold_run
from megacl.guard import Guard
from megacl.handover import after_step, described, go_on, take_over
from megacl.health import Needs, check_health
from megacl.lineage import pass_over, save_lineage
from megacl.log import RunLog, table_text
from megacl.model.gpt import build_model, count_parameters
from megacl.optimizer import decayed_part
from megacl.parallel.ranks import Ranks, start_ranks, stop_ranks
from megacl.plan import (
    begin_phase,
    check_batches,
    check_phases,
    check_ranks,
    how_it_begins,
    open_phase,
    peak_of,
    schedule_of,
)
from megacl.plan_memory import copied_by_saves, host_of_rank, largest_phase
from megacl.publish import publish_text
from megacl.records import record_evaluation, record_step
from megacl.resume import Found, check_no_data, find_inputs, find_origin, open_sources
from megacl.saves import Saves
from megacl.starting import begin_with
from megacl.stopping import StopSignal, ToldToStop
from megacl.waiting import next_batch
from megacl.watchdog import Watchdog

Outcome = Literal["done", "stopped"]

_STOPPED_EARLY = "told to stop before training began; the same command goes on"
_WATCHED = 3 / 4
"""The part of engine.timeout after which a rank on which nothing moves on is given up: before collectives give up, and
take each rank away from where it stood."""


def train(config: RunConfig, *, resume: bool = True, until_phase: str | None = None) -> Outcome:
    """Trains all phases of `config` that are not finished yet. Every rank calls it.

    resume: go on where the run directory's newest good checkpoint stands; if False, a run directory that already holds
    a run is an error. until_phase: leave off at the end of that phase, "done" as ever; a later call goes on with the
    next one. Raises ConfigError, DataError, CheckpointError, LaunchError or DivergedError, each in one line.
    """
    end = _end_of(config, until_phase)
    run_dir = Path(config.run_dir)
    ending = Ending(run_dir, Watchdog(config.engine.timeout * _WATCHED))
    with ending.told():
        ranks = start_ranks(timeout=config.engine.timeout, rendezvous_timeout=config.engine.rendezvous_timeout)
    log = RunLog(
        run_dir, rank=ranks.rank, every_steps=config.logging.every_steps, tensorboard=config.logging.tensorboard
    )
    try:
        with (
            StopSignal() as stop,
            wanted_until(lambda: stop.received),
            ending.told(),
            contextlib.ExitStack() as until_the_end,
        ):
            with ranks.together():
                check_engine(config.engine, device=device_here())
                check_ranks(config, ranks.world_size)
            config = ranks.broadcast(config)  # composed from what another run still writes, it could differ
            ranks = ranks.arrange(
                tensor_parallel=config.engine.tensor_parallel, sequence_parallel=config.engine.sequence_parallel
            )
            found: Found | None = None
            fence: Fence | None = None
            with ranks.together():
                check_batches(config, ranks.dp_size)
                _provide(config, ranks, log, stop)
                if ranks.rank == 0:
                    check_no_data(run_dir)
                    if run_dir.exists():  # one that is not there is made, and held, where nothing is wrong
                        fence = until_the_end.enter_context(hold_run(run_dir, log.warn))
                    found = _find(config, run_dir, resume=resume, warn=log.warn)
            found = ranks.broadcast(found)
            with ranks.together():
                # What would stop phase 3 stops the run before it writes.
                steps = check_phases(found, log.warn, shards=ranks.rank == 0)
            step = found.origin.checkpoint.state.step if found.origin.checkpoint else 0
            if begun := ranks.broadcast(fence is not None):
                until_the_end.enter_context(ending.attempt(ranks, step=step))
            if ranks.world_size > 1 or "SLURM_JOB_ID" in os.environ:
                log.say(_check_health(found, ranks, run_dir))
            seed = None if found.origin.loaded else config.seed
            model = build_model(found.config.model, seed=seed, device="meta")
            if config.boundaries == "attention":
                model.document_end = found.inputs.tokenizer.eos_id
            engine = build_engine(model, engine=config.engine, optimizer=config.optimizer, ranks=ranks)
            with ranks.together():
                if ranks.rank == 0:
                    if fence is None:
                        fence = until_the_end.enter_context(hold_run(run_dir, log.warn))
                        if (run_dir / "config.yaml").exists():
                            raise DataError(f"{run_dir}: another run has begun there meanwhile; name another run_dir.")
                    publish_text(run_dir / "config.yaml", dump(found.config), "the configuration", fence.check)
            fence = ranks.broadcast(fence)
            assert fence is not None, "rank 0 holds the run"
            if not begun:
                until_the_end.enter_context(ending.attempt(ranks, step=step))
            return _Run(found, run_dir, ranks, log, engine, stop, steps, end, fence, ending).train()
    except (ToldToStop, StoppedError):
        log.say(_STOPPED_EARLY)
        return "stopped"
    finally:
        log.close()
        stop_ranks()


def _end_of(config: RunConfig, until_phase: str | None) -> int:
    """How many of the phases are to be trained."""
    names = [phase.name for phase in config.phases]
    if until_phase is None:
        return len(names)
    if until_phase not in names:
        raise ConfigError(
            f"--until-phase is {until_phase!r}, which is no phase of the run{nearest(until_phase, names)}"
        )
    return names.index(until_phase) + 1


def _find(config: RunConfig, run_dir: Path, *, resume: bool, warn: Callable[[str], None]) -> Found:
    """What the run begins with; for one rank alone, which gives it to the others.

    Hundreds that open the same files at once, or hash what they go on from, keep a shared file system from all else.
    """
    newest = newest_checkpoint(run_dir, warn)
    origin = find_origin(config, run_dir, newest, resume=resume, warn=warn)
    return find_inputs(config, origin, open_sources(config, origin))


def _check_health(found: Found, ranks: Ranks, run_dir: Path) -> str:
    """What the nodes have for this run, in a line; UnhealthyError where one has too little, or is not as the others."""
    config, inputs, device = found.config, found.inputs, device_here()
    _, estimate = largest_phase(config, ranks.world_size, device)
    needs = Needs(
        checkpoint=copied_by_saves(config, 1),
        host=host_of_rank(config, estimate, ranks.world_size, device),
        device=estimate.peak.total if device == "cuda" else 0,
        cached=sum(int(each.train.sizes.sum() + each.validation.sizes.sum()) for each in inputs.opened if each.cached),
    )
    return check_health(ranks, needs, run_dir=run_dir, cache=inputs.cache, sources=inputs.opened)


def _provide(config: RunConfig, ranks: Ranks, log: RunLog, stop: StopSignal) -> None:
    """Makes the sources that are not there yet, on one rank alone: it may take hours, and others would wait."""
    if ranks.world_size == 1:
        with stop.at_once():
            provide_sources(config.tokenizer, config.sources, log.say)
    elif missing := missing_sources(config.sources):
        raise DataError(
            f"source {missing[0]!r} is not prepared, and one rank would keep {ranks.world_size - 1} waiting; "
            "run `megacl prepare` first, or this command on one rank until it trains."
        )


class _Run:
    """One run on one rank: what its phases share."""

    def __init__(
        self,
        found: Found,
        run_dir: Path,
        ranks: Ranks,
        log: RunLog,
        engine: Engine,
        stop: StopSignal,
        total_steps: int,
        end: int,
        fence: Fence,
        ending: Ending,
    ) -> None:
        """end: how many phases of the run's are to be trained."""
        self.end, self.fence, self.ending, self.watchdog = end, fence, ending, ending.watchdog
        engine.progress = self.watchdog.progress
        cache = found.config.cache
        self.patience = cache.patience if cache else 0.0  # with a store that fails
        self.origin, self.config, self.inputs = found.origin, found.config, found.inputs
        self.run_dir, self.ranks, self.log, self.engine, self.stop = run_dir, ranks, log, engine, stop
        self.lineage = found.origin.lineage
        checkpoint = found.origin.checkpoint
        self.step = checkpoint.state.step if checkpoint else 0
        fp16 = self.config.engine.precision == "fp16"
        self.guard = Guard(
            self.config.stability,
            run_dir,
            found.origin,
            ranks,
            log,
            fp16=fp16,
            begin_with=lambda parent: begin_with(parent, self.config, self.inputs.tokenizer),
        )
        self.saves = Saves(
            engine,
            ranks,
            self.guard,
            log,
            config=self.config,
            tokenizer=self.inputs.tokenizer,
            last_good=checkpoint.path if checkpoint else None,
            permit=fence.check,
            resting=self.watchdog.resting,
        )
        self.total_steps = total_steps
        self.alarmed = False
        with ranks.together():
            self.evaluated, problems = sources_of(
                self.lineage,
                self.inputs.sources,
                self.inputs.history,
                self.inputs.cache,
                pass_over_unreachable=True,  # what it does not train on does not keep it from training
            )
        for problem in problems:
            log.warn(f"not evaluated: {problem}")
        if not any(source.validation.tokens for source in self.evaluated.values()):
            log.warn("no source has held-out documents: nothing is evaluated")

    def train(self) -> Outcome:
        """Loads what there is to go on from, and trains the phases that are left."""
        outcome = self._train()
        until = self.config.phases[self.end - 1].name if self.end else "none"
        self.ending.ended(
            outcome,
            f"trained until the end of phase {until}" if outcome == "done" else f"told to stop at step {self.step}",
        )
        return outcome

    def _train(self) -> Outcome:
        origin = self.origin
        self.log.say(self._greeting())
        for line in how_it_begins(origin):
            self.log.say(f"  {line}")
        table = [[choice.op, choice.implementation, choice.why] for choice in self.engine.choices]
        for line in table_text(["op", "implementation", "why"], table, align="lll"):
            self.log.say(f"  {line}")
        for notice in self.engine.notices:
            self.log.warn(notice)
        if origin.loaded is not None:
            origin.loaded.load_into(self.engine)
        with self.ranks.together():
            self.log.keep_until(self.step if origin.checkpoint else -1, self.fence.check)
            self._publish_lineage()
        try:
            self._evaluate_what_is_owed()
        except EvaluationStopped:
            self.log.say(_STOPPED_EARLY)
            return "stopped"
        try:
            for index in range(origin.phase, self.end):
                if self._train_phase(index, origin.samples if index == origin.phase else 0) == "stopped":
                    return "stopped"
        except DivergedError:
            self.saves.settle()  # what was good is not lost
            raise
        finally:
            self.saves.abandon()
        with self.ranks.together():
            self.log.flush()
        return "done"

    def _evaluate_what_is_owed(self) -> None:
        """Where a run begins, every source; where it goes on, those that the checkpoint's step still lacks.

        The save comes before the evaluation, so a run that was stopped or killed in between owes it; and a phase that
        was appended may bring new sources, whose loss before it is worth knowing.
        """
        checkpoint, phases = self.origin.checkpoint, self.config.phases
        if checkpoint is None:
            self._evaluate(phases[0].name, "start", self.evaluated)
            return
        done = self.ranks.broadcast(self.log.evaluated_at(self.step))
        held_out = {name: source for name, source in self.evaluated.items() if source.validation.tokens}
        owed = {name: source for name, source in held_out.items() if name not in done}
        if owed:
            self._evaluate_if_due(phases[checkpoint.state.phase], owed, ended=checkpoint.state.phase_end)

    def _begin_lineage(self) -> None:
        """Publishes the lineage where a phase begins. A disk that refuses it inside a run is told, and asked again."""
        try:
            with self.ranks.together():
                self._publish_lineage()
        except DataError as error:
            if not self.step:
                raise
            self.log.warn(str(error))

    def _publish_lineage(self) -> None:
        if self.ranks.rank == 0:
            save_lineage(self.lineage, self.run_dir, self.fence.check)

    def _greeting(self) -> str:
        config = self.config
        size = f"{count_parameters(config.model):,} parameters"
        ranks = self.ranks
        groups = f" in {ranks.dp_size} data-parallel group(s)" if ranks.dp_size < ranks.world_size else ""
        what = f"{size}, {config.engine.kind} engine, {ranks.world_size} rank(s){groups}"
        parent = self.origin.parent
        where = (
            f"from {parent.path}" if parent else f"going on at step {self.step}" if self.step else "from the beginning"
        )
        until = f", until the end of phase {config.phases[self.end - 1].name}" if self.end < len(config.phases) else ""
        return f"run {self.run_dir}: {what}; {self.total_steps} steps, {where}{until}"

    def _train_phase(self, index: int, samples: int) -> Outcome:
        config, phase = self.config, self.config.phases[index]
        if samples == 0:
            self.saves.leave()
            record = take_over(self.engine, begin_phase(config, index, self.lineage, self.inputs.sources))
            self.log.say(f"phase {record.name}: {record.budget_steps:,} steps; {described(record)}")
            self.lineage = self.lineage.with_phase(record)
            self._begin_lineage()
        else:
            go_on(self.engine, self.lineage.phases[-1])
        batch_size = config.batch_size_of(phase)
        with self.ranks.together():
            stream = open_phase(self.lineage, self.inputs)
            packings = stream.packings()
        for line in packings:
            self.log.say(line)
        loader = Loader(
            stream,
            batch_size=batch_size,
            rank=self.ranks.dp_rank,
            world_size=self.ranks.dp_size,
            vocab_size=config.model.vocab_size,
            stage=self.engine.stage,
        )
        loader.load_state_dict({"samples": samples})
        schedule = schedule_of(config, phase, stream.record.start_lr, stream.record.budget_steps)
        highest = peak_of(phase, self.lineage)
        began, waited = time.perf_counter(), 0.0
        with loader.reading() as poll:

            def watched(seconds: float | None) -> Batch | None:
                if (batch := poll(seconds)) is not None:
                    self.watchdog.note(f"waiting for the other ranks' parts of the batch of step {self.step + 1}")
                return batch

            while samples < stream.record.budget_samples:
                self.watchdog.begin(f"reading its part of the batch of step {self.step + 1}", allow=self.patience)
                found = next_batch(
                    watched,
                    self.ranks,
                    self.stop,
                    self.saves,
                    self.fence.check,
                    arrived=lambda: loader.arrived,
                    progress=self.watchdog.progress,
                )
                if found is None:
                    return self._stopped()
                batch, targets = found
                samples = batch.first_sample + batch_size
                self._step(
                    index,
                    stream,
                    batch,
                    lr := schedule(samples // batch_size),
                    weight_decay=decayed_part(config.optimizer, lr=lr, peak=highest),
                    targets=targets if stream.padded else None,
                    waited=loader.waited - waited,
                )
                waited = loader.waited
                ended = samples == stream.record.budget_samples
                with self.watchdog.resting(f"saving, or going back, at step {self.step}"):
                    self._keep(index, stream, ended=ended)
                try:
                    self._evaluate_if_due(phase, self.evaluated, ended=ended)
                except EvaluationStopped:
                    return self._stopped()
                except DataError:
                    self.saves.finish()
                    raise
        self.watchdog.rest(f"between phases, at step {self.step}")
        seconds = time.perf_counter() - began
        self.log.say(f"phase {phase.name}: {waited:.2f} s of {seconds:.1f} s were spent waiting for data")
        return "done"

    def _stopped(self) -> Outcome:
        """Ends the run, told to stop, with what it has done saved."""
        self.saves.finish()
        self.log.say(
            f"told to stop: saved at step {self.step}; the same command goes on from there"
            if self.saves.last_good
            else _STOPPED_EARLY
        )
        return "stopped"

    def _step(
        self,
        index: int,
        stream: PhaseStream,
        batch: Batch,
        lr: float,
        *,
        weight_decay: float | None,
        targets: int | None,
        waited: float,
    ) -> None:
        """Takes one step, and counts and records what came of it. Raises DivergedError where the run cannot go on."""
        record = self.lineage.phases[-1]
        start = time.perf_counter()
        monitor = _due(self.step + 1, self.config.logging.monitor_every_steps)
        self.watchdog.begin(f"step {self.step + 1}")
        result = self.engine.step(
            batch.tokens,
            lr,
            targets=targets,
            weight_decay=weight_decay,
            skip_above=self.guard.threshold(record),
            monitor=monitor,
        )
        samples, passed_over = batch.first_sample + record.global_batch_size, record.passed_over
        after_step(self.engine, record, samples // record.global_batch_size)
        seconds = time.perf_counter() - start
        self.step += 1
        self.ending.stepped(self.step)
        if not result.applied:
            passed_over = pass_over(passed_over, batch.first_sample, samples)
        self.lineage = self.lineage.with_phase(stream.seen(samples, lr, passed_over))
        record_step(
            self.log,
            self.lineage,
            self.config.model,
            result,
            step=self.step,
            total_steps=self.total_steps,
            begun=index + 1,
            lr=lr,
            seconds=seconds,
            waited=waited,
            targets=targets,
        )
        if result.monitors is not None and not self.alarmed and (alarm := result.monitors.alarm()):
            self.alarmed = True
            self.log.warn(f"step {self.step}: {alarm}")
        self.guard.judge(result, self.step, self._last_good)  # at last, so that a step that ends the run is recorded

    def _evaluate_if_due(self, phase: PhaseConfig, sources: Mapping[str, Source], *, ended: bool) -> None:
        if ended or _due(self.step, self.config.evaluation.every_steps):
            self._evaluate(phase.name, "end" if ended else "interval", sources)

    def _evaluate(self, phase: str, at: str, sources: Mapping[str, Source]) -> None:
        evaluation = self.config.evaluation
        self.watchdog.begin(f"evaluating at step {self.step}", allow=self.patience)
        results = evaluate_sources(
            self.engine,
            self.ranks,
            sources,
            seq_length=self.config.seq_length,
            micro_batch_size=evaluation.micro_batch_size,
            sequences=evaluation.sequences,
            stop=self._stops_evaluating,
        )
        self.watchdog.rest(f"after the evaluation at step {self.step}")
        record_evaluation(self.log, self.lineage, results, step=self.step, phase=phase, at=at)
        broken = [name for name, result in results.items() if not math.isfinite(result.loss)]
        if broken:
            raise DivergedError(
                f"step {self.step}: the held-out loss of {', '.join(broken)} is not finite; {self._last_good()}. "
                "Lower max_lr or lengthen the warm-up in a new run_dir."
            )

    def _stops_evaluating(self) -> bool:
        self.watchdog.progress()  # it is asked before each batch
        return self.stop.received

    def _last_good(self) -> str:
        self.saves.settle()
        last = self.saves.last_good
        return f"the last checkpoint is {last}" if last else "no checkpoint was saved yet"

    def _keep(self, index: int, stream: PhaseStream, *, ended: bool) -> None:
        """Goes back to a checkpoint if it must, notes where the run stands after a step, and saves that if due."""
        save = ended or _due(self.step, self.config.checkpoint.every_steps)
        if save or self.guard.has_given_up:
            self.saves.settle()  # which may set what the run goes back to
        if self.guard.has_given_up:
            record = self.guard.go_back(self.engine, stream, self.lineage.phases[-1], self.step)
            self.lineage, save = self.lineage.with_phase(record), True
        if save and (ended or not self.guard.watch.skipped):  # amid skipped ones, there is nothing to go back to
            self.guard.back_to = self.step
        state = RunState(
            step=self.step,
            phase=index,
            samples=self.lineage.phases[-1].samples,
            phase_end=ended,
            watch=self.guard.watch,
            back_to=self.guard.back_to,
            parent=self.guard.parent,
        )
        self.saves.note(state, self.lineage)
        if ended and index == self.end - 1:
            self.saves.finish()
        elif save:
            self.saves.save()
            if ended:  # whoever waits for the phase finds it
                self.saves.settle()


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
