"""A run: its phases one after another, logged, evaluated, saved, and stopped when it is told to.

    outcome = train(config)        # on every rank; "done", or "stopped" where a signal asked for it

The run directory is a contract that all readers share (docs/formats.md): config.yaml (resolved), metrics.jsonl,
lineage.json, checkpoints/step-N/. Running the same configuration again goes on where the newest good checkpoint stands,
and the result is the one of an undisturbed run.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from megacl.checkpoint import RunState, newest_checkpoint, prune_checkpoints, save_checkpoint
from megacl.config import RunConfig
from megacl.config_phase import PhaseConfig
from megacl.configfile import dump
from megacl.data.loader import Batch, Loader
from megacl.data.provide import missing_sources, provide_sources
from megacl.data.source import Source
from megacl.data.store import wanted_until
from megacl.data.stream import PhaseStream
from megacl.engine import Engine, build_engine, check_engine, device_here
from megacl.errors import DataError, DivergedError, MegaclError, StoppedError
from megacl.evaluate import EvaluationStopped, evaluate_sources, sources_of
from megacl.guard import Guard
from megacl.lineage import pass_over, save_lineage
from megacl.log import RunLog, table_text
from megacl.model.gpt import build_model, count_parameters
from megacl.optimizer import decayed_part
from megacl.parallel.ranks import Ranks, start_ranks, stop_ranks
from megacl.plan import begin_phase, check_batches, check_phases, check_ranks, open_phase, schedule_of
from megacl.publish import alone_in, publish_text, sweep_unfinished
from megacl.records import record_evaluation, record_step
from megacl.resume import Found, find_inputs, find_origin, open_sources
from megacl.schedules import peak
from megacl.stopping import StopSignal, ToldToStop

Outcome = Literal["done", "stopped"]

_STOPPED_EARLY = "told to stop before training began; the same command goes on"

_LOOK = 0.5
"""Seconds between two looks at what other ranks and signals say, while a rank waits for its next batch."""


def train(config: RunConfig, *, resume: bool = True) -> Outcome:
    """Trains all phases of `config` that are not finished yet. Every rank calls it.

    resume: go on where the run directory's newest good checkpoint stands; if False, a run directory that already holds
    a run is an error. Raises ConfigError, DataError, CheckpointError, LaunchError or DivergedError, each in one line.
    """
    ranks = start_ranks(timeout=config.engine.timeout)
    run_dir = Path(config.run_dir)
    log = RunLog(
        run_dir, rank=ranks.rank, every_steps=config.logging.every_steps, tensorboard=config.logging.tensorboard
    )
    try:
        with StopSignal() as stop, wanted_until(lambda: stop.received), contextlib.ExitStack() as until_the_end:
            with ranks.together():
                check_engine(config.engine, device=device_here())
                check_ranks(config, ranks.world_size)
            ranks = ranks.arrange(
                tensor_parallel=config.engine.tensor_parallel, sequence_parallel=config.engine.sequence_parallel
            )
            newest, locked = None, False
            with ranks.together():
                check_batches(config, ranks.dp_size)
                _provide(config, ranks, log, stop)
                if ranks.rank == 0:
                    locked = run_dir.exists()  # one that is not there is made, and locked, where nothing is wrong
                    if locked:
                        until_the_end.enter_context(alone_in(run_dir, "another run"))
                    newest = newest_checkpoint(run_dir, log.warn)
            newest = ranks.broadcast(newest)
            with ranks.together():
                origin = find_origin(config, run_dir, newest, resume=resume, warn=log.warn)
                # One rank reads the lists of shards, which may be long, and gives them to the others.
                opened = open_sources(config, origin) if ranks.rank == 0 else None
            opened = ranks.broadcast(opened)
            with ranks.together():
                found = find_inputs(config, origin, opened)
                steps = check_phases(found, log.warn)  # what would stop phase 3 stops the run before it writes
            model = build_model(found.config.model, seed=config.seed, device="meta")
            if config.boundaries == "attention":
                model.document_end = found.inputs.tokenizer.eos_id
            engine = build_engine(model, engine=config.engine, optimizer=config.optimizer, ranks=ranks)
            with ranks.together():
                if ranks.rank == 0:
                    if not locked:
                        until_the_end.enter_context(alone_in(run_dir, "another run"))
                        if (run_dir / "config.yaml").exists():
                            raise DataError(f"{run_dir}: another run has begun there meanwhile; name another run_dir.")
                    sweep_unfinished(run_dir / "checkpoints")
                    publish_text(run_dir / "config.yaml", dump(found.config), "the configuration")
            return _Run(found, run_dir, ranks, log, engine, stop, steps).train()
    except (ToldToStop, StoppedError):
        log.say(_STOPPED_EARLY)
        return "stopped"
    finally:
        log.close()
        stop_ranks()


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
    ) -> None:
        self.origin, self.config, self.inputs = found.origin, found.config, found.inputs
        self.run_dir, self.ranks, self.log, self.engine, self.stop = run_dir, ranks, log, engine, stop
        self.lineage = found.origin.lineage
        checkpoint = found.origin.checkpoint
        self.step = checkpoint.state.step if checkpoint else 0
        self.last_good = checkpoint.path if checkpoint else None
        self.unsaved: RunState | None = None  # where the run stands, if no checkpoint stands there
        fp16 = self.config.engine.precision == "fp16"
        self.guard = Guard(self.config.stability, run_dir, found.origin, ranks, log, fp16=fp16)
        self.total_steps = total_steps
        self.alarmed = False
        with ranks.together():
            self.evaluated, problems = sources_of(
                self.lineage, self.inputs.sources, self.inputs.history, self.inputs.cache
            )
        for problem in problems:
            log.warn(f"not evaluated: {problem}")
        if not any(source.validation.tokens for source in self.evaluated.values()):
            log.warn("no source has held-out documents: nothing is evaluated")

    def train(self) -> Outcome:
        """Loads what there is to go on from, and trains the phases that are left."""
        origin, phases = self.origin, self.config.phases
        self.log.say(self._greeting())
        table = [[choice.op, choice.implementation, choice.why] for choice in self.engine.kernels.choices]
        for line in table_text(["op", "implementation", "why"], table, align="lll"):
            self.log.say(f"  {line}")
        for notice in self.engine.notices:
            self.log.warn(notice)
        loaded = origin.checkpoint or origin.parent
        if loaded is not None:
            loaded.load_into(self.engine)
        with self.ranks.together():
            self.log.keep_until(self.step if origin.checkpoint else -1)
            self._publish_lineage()
        try:
            self._evaluate_what_is_owed()
        except EvaluationStopped:
            self.log.say(_STOPPED_EARLY)
            return "stopped"
        for index in range(origin.phase, len(phases)):
            if self._train_phase(index, origin.samples if index == origin.phase else 0) == "stopped":
                return "stopped"
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
        owed = {name: source for name, source in self.evaluated.items() if name not in done}
        if owed:
            self._evaluate_if_due(phases[checkpoint.state.phase], owed, ended=checkpoint.state.phase_end)

    def _publish_lineage(self) -> None:
        if self.ranks.rank == 0:
            save_lineage(self.lineage, self.run_dir)

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
        return f"run {self.run_dir}: {what}; {self.total_steps} steps, {where}"

    def _train_phase(self, index: int, samples: int) -> Outcome:
        config, phase = self.config, self.config.phases[index]
        if samples == 0:
            record = begin_phase(config, index, self.lineage, self.inputs.sources)
            if record.optimizer_state == "reset":
                self.engine.reset_optimizer()
            self.lineage = self.lineage.with_phase(record)
            with self.ranks.together():
                self._publish_lineage()
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
        highest = peak(phase.schedule, last_lr=stream.record.start_lr)
        began, waited = time.perf_counter(), 0.0
        with loader.reading() as poll:
            while samples < stream.record.budget_samples:
                if (found := self._next_batch(poll)) is None:
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
                self._keep(index, stream, ended=ended)
                try:
                    self._evaluate_if_due(phase, self.evaluated, ended=ended)
                except EvaluationStopped:
                    return self._stopped()
                except DataError:
                    self._save()
                    raise
        seconds = time.perf_counter() - began
        self.log.say(f"phase {phase.name}: {waited:.2f} s of {seconds:.1f} s were spent waiting for data")
        return "done"

    def _next_batch(self, poll: Callable[[float | None], Batch | None]) -> tuple[Batch, int] | None:
        """The next batch, once every rank has its part, and how many tokens all of it predicts; None if told to stop.

        So long as one rank waits for its data, all come together here now and then: a signal is heard on any of them,
        and no collective of a step waits for a store. Where a rank cannot read its part, all save and raise its error.
        """
        batch: Batch | None = None
        error: MegaclError | None = None
        while True:
            try:
                batch = batch or poll(_LOOK)
            except MegaclError as raised:
                error = raised
            said = [self.stop.received, error is not None, batch is not None, batch.targets if batch else 0]
            told, failed, ready, targets = self.ranks.sum(np.array(said, np.float64))
            if told:
                return None
            if failed:
                self._save()
                with self.ranks.together():
                    if error is not None:
                        raise error
            if batch is not None and ready == self.ranks.world_size:
                # Ranks that share layers or sequences hold the same part of the batch.
                return batch, int(targets) * self.ranks.dp_size // self.ranks.world_size

    def _stopped(self) -> Outcome:
        """Ends the run, told to stop, with what it has done saved."""
        self._save()
        self.log.say(
            f"told to stop: saved at step {self.step}; the same command goes on from there"
            if self.last_good
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
        result = self.engine.step(
            batch.tokens,
            lr,
            targets=targets,
            weight_decay=weight_decay,
            skip_above=self.guard.threshold(record),
            monitor=monitor,
        )
        seconds = time.perf_counter() - start
        self.step += 1
        samples, passed_over = batch.first_sample + record.global_batch_size, record.passed_over
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
        self.guard.judge(result, self.step, self._last_good())  # at last, so that a step that ends the run is recorded

    def _evaluate_if_due(self, phase: PhaseConfig, sources: Mapping[str, Source], *, ended: bool) -> None:
        if ended or _due(self.step, self.config.evaluation.every_steps):
            self._evaluate(phase.name, "end" if ended else "interval", sources)

    def _evaluate(self, phase: str, at: str, sources: Mapping[str, Source]) -> None:
        evaluation = self.config.evaluation
        results = evaluate_sources(
            self.engine,
            self.ranks,
            sources,
            seq_length=self.config.seq_length,
            micro_batch_size=evaluation.micro_batch_size,
            sequences=evaluation.sequences,
            stop=lambda: self.stop.received,
        )
        record_evaluation(self.log, self.lineage, results, step=self.step, phase=phase, at=at)
        broken = [name for name, result in results.items() if not math.isfinite(result.loss)]
        if broken:
            raise DivergedError(
                f"step {self.step}: the held-out loss of {', '.join(broken)} is not finite; {self._last_good()}. "
                "Lower max_lr or lengthen the warm-up in a new run_dir."
            )

    def _last_good(self) -> str:
        return f"the last checkpoint is {self.last_good}" if self.last_good else "no checkpoint was saved yet"

    def _keep(self, index: int, stream: PhaseStream, *, ended: bool) -> None:
        """Goes back to a checkpoint if it must, notes where the run stands after a step, and saves that if due."""
        save = ended or _due(self.step, self.config.checkpoint.every_steps)
        if self.guard.has_given_up:
            record = self.guard.go_back(self.engine, stream, self.lineage.phases[-1], self.step)
            self.lineage, save = self.lineage.with_phase(record), True
        if save and (ended or not self.guard.watch.skipped):  # amid skipped ones, there is nothing to go back to
            self.guard.back_to = self.step
        self.unsaved = RunState(
            step=self.step,
            phase=index,
            samples=self.lineage.phases[-1].samples,
            phase_end=ended,
            watch=self.guard.watch,
            back_to=self.guard.back_to,
            parent=self.guard.parent,
        )
        if save:
            self._save()

    def _save(self) -> None:
        """Saves the last step that was made, where no checkpoint stands there yet."""
        if self.unsaved is None:
            return
        self.last_good = save_checkpoint(
            self.engine,
            self.ranks,
            self.run_dir,
            self.unsaved,
            lineage=self.lineage,
            config=self.config,
            tokenizer=self.inputs.tokenizer,
        )
        self.unsaved = None
        with self.ranks.together():
            self._publish_lineage()
            if self.ranks.rank == 0:
                prune_checkpoints(self.run_dir, self.last_good, self.config.checkpoint.keep_last, self.guard.back_to)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
