"""Runs: what they write, what they compute, how they stop and go on."""

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Prepared, write_documents
from runs import WEIGHTS, last_state, losses, metrics, start, state, status_of
from torch.nn import functional

from megacl.checkpoint import checkpoint_path, find_checkpoint, list_checkpoints, mark_of, open_checkpoint
from megacl.checkpoint_files import TensorFiles
from megacl.configfile import from_tree, load
from megacl.data.prepare import prepare
from megacl.data.source import open_source
from megacl.data.stream import PhaseStream, open_recorded
from megacl.data.tokenizer import load_tokenizer
from megacl.errors import CheckpointError, ConfigError, DataError, DivergedError
from megacl.lineage import BranchRecord, load_lineage
from megacl.model.gpt import build_model
from megacl.publish import alone_in
from megacl.trainer import train
from megacl.transfer import read_matrix

# As the processes have that some tests start, so that states compare to the bit.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of both phases."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(from_tree(prepared.tree(run_dir))) == "done"
    return run_dir


def test_a_run_that_compiles_nothing_starts_without_pytorchs_compiler(prepared: Prepared, tmp_path: Path) -> None:
    """Whose import takes over a second, at each start of each rank."""
    config = str(prepared.config_file(tmp_path / "run"))
    trained = (
        f"import sys; from megacl.configfile import load; from megacl.trainer import train; train(load([{config!r}]))"
    )
    assert status_of(f"{trained}; sys.exit(3 if 'torch._dynamo' in sys.modules else 0)") == 0
    assert len(losses(tmp_path / "run")) == 20


# ---------------------------------------------------------------------------------------------- what a run writes


def test_a_run_writes_one_record_a_step_and_evaluates_every_source_where_phases_begin_and_end(whole: Path) -> None:
    steps = metrics(whole, "step")
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert [record["phase"] for record in steps] == ["english"] * 12 + ["german"] * 8
    assert [record["tokens"] for record in steps] == [12 * 32 * k for k in range(1, 21)]
    assert [record["samples"] for record in steps] == [12 * k for k in range(1, 13)] + [12 * k for k in range(1, 9)]
    evaluations = metrics(whole, "evaluation")
    assert [(record["step"], record["phase"], record["at"]) for record in evaluations] == [
        (0, "english", "start"),
        (12, "english", "end"),
        (20, "german", "end"),
    ]
    assert all(set(record["sources"]) == {"english", "german"} for record in evaluations)


def test_the_rate_warms_up_again_from_where_the_last_phase_ended_and_ends_at_its_floor(whole: Path) -> None:
    rates = [record["lr"] for record in metrics(whole, "step")]
    assert rates[1] == rates[13] == 5e-3
    assert rates[11] == rates[19] == 0.1 * 5e-3
    assert rates[12] == pytest.approx((0.1 * 5e-3 + 5e-3) / 2)


def test_checkpoints_stand_at_intervals_and_phase_ends_and_old_ones_inside_phases_go(whole: Path) -> None:
    assert [path.name for path in list_checkpoints(whole)] == [
        "step-00000010",
        "step-00000012",
        "step-00000015",
        "step-00000020",
    ]
    ends = [open_checkpoint(path).state.phase_end for path in list_checkpoints(whole)]
    assert ends == [False, True, False, True]


def test_the_resolved_configuration_pins_the_generation_and_is_a_configuration(whole: Path) -> None:
    config = load([str(whole / "config.yaml")])
    assert {source.generation for source in config.sources.values()} == {1}
    assert train(config) == "done"  # nothing is left to do
    assert len(metrics(whole, "step")) == 20


def test_the_lineage_says_what_was_read_and_replayed(whole: Path) -> None:
    english, german = load_lineage(whole).phases
    assert (english.samples, english.optimizer_state, english.replay) == (144, "new", None)
    assert (german.samples, german.optimizer_state, german.own_samples) == (96, "reset", 72)
    assert german.replay is not None
    assert [(entry.phase, entry.samples) for entry in german.replay.from_] == [("english", 24)]
    assert german.sources[0].samples == 72


# ---------------------------------------------------------------------------------------------- what a run computes


def test_losses_are_those_of_a_plain_loop_over_the_same_samples(prepared: Prepared, whole: Path) -> None:
    """The same model under torch's own AdamW, cross-entropy and clipping, fed from the lineage."""
    config = load([str(whole / "config.yaml")])
    model = build_model(config.model, seed=config.seed)
    expected = []
    lineage = load_lineage(whole)
    rates = iter([record["lr"] for record in metrics(whole, "step")])
    for index, phase in enumerate(lineage.phases):
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)  # anew: its state is reset by re-warming
        stream = PhaseStream(type(lineage)(phases=lineage.phases[: index + 1]), open_recorded)
        for first in range(0, phase.samples, 12):
            tokens = torch.from_numpy(stream.read(np.arange(first, first + 12)))
            logits = model(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = next(rates)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            expected.append(loss.item())
    assert losses(whole) == pytest.approx(expected, rel=1e-5)


def test_the_micro_batch_does_not_change_the_losses(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    tree = prepared.tree(tmp_path / "run", engine={"micro_batch_size": 3})
    train(from_tree(tree))
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)


def test_two_ranks_under_torchrun_give_the_losses_of_one_and_hand_the_run_back(
    prepared: Prepared, whole: Path, tmp_path: Path
) -> None:
    """Six steps native, then ZeRO-2 on two ranks to the end of the first phase, then native again."""
    run_dir = tmp_path / "run"
    tree = prepared.tree(run_dir)
    tree["checkpoint"] = {"every_steps": 6}
    config = from_tree(tree)
    stop_after(config, steps=6)
    shards = prepared.config_file(run_dir, engine={"kind": "deepspeed", "zero_stage": 2}, checkpoint={"every_steps": 6})
    process = start(
        "train",
        shards,
        launcher=["torch.distributed.run", "--nproc-per-node=2", "--standalone"],
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert len(metrics(run_dir, "step")) == 20
    assert losses(run_dir) == pytest.approx(losses(whole), rel=1e-5)


def stop_after(config: Any, *, steps: int) -> None:
    """Trains until the run is told to stop in the middle of the step `steps`, as SLURM would."""
    from megacl import trainer

    original = trainer._Run._step

    def step(self: Any, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **more)
        if self.step == steps:
            signal.raise_signal(signal.SIGUSR1)

    trainer._Run._step = step  # type: ignore[method-assign]
    try:
        assert train(config) == "stopped"
    finally:
        trainer._Run._step = original  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize("steps", [1, 7, 12, 14])
def test_told_to_stop_and_started_again_a_run_ends_bitwise_as_if_undisturbed(
    prepared: Prepared, whole: Path, tmp_path: Path, steps: int
) -> None:
    config = from_tree(prepared.tree(tmp_path / "run"))
    stop_after(config, steps=steps)
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step-{steps:08d}"
    assert train(config) == "done"
    assert last_state(tmp_path / "run") == last_state(whole)
    assert losses(tmp_path / "run") == losses(whole)


def test_a_run_that_has_a_checkpoint_to_load_draws_no_weights(
    prepared: Prepared, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of billions of them that would take minutes at each restart."""
    stop_after(from_tree(prepared.tree(tmp_path / "run")), steps=7)
    monkeypatch.setattr("megacl.model.gpt._generator", pytest.fail)
    assert train(from_tree(prepared.tree(tmp_path / "run"))) == "done"
    assert last_state(tmp_path / "run") == last_state(whole)
    child = prepared.tree(tmp_path / "child", start_from=str(whole))
    child["phases"] = [{**child["phases"][0], "name": "more-english"}]
    assert train(from_tree(child)) == "done"


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGUSR1])
def test_a_signal_from_outside_saves_and_exits_with_75(
    prepared: Prepared, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    tree = prepared.tree(run_dir)
    tree["phases"][0]["steps"] = 5000
    tree["checkpoint"] = {}
    config = prepared.config_file(run_dir, **{key: tree[key] for key in ("phases", "checkpoint")})
    process = start("train", config)
    wait_for_steps(run_dir, 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "told to stop" in err
    checkpoint = open_checkpoint(find_checkpoint(str(run_dir), pytest.fail))
    assert checkpoint.state.step == len(metrics(run_dir, "step"))


def test_a_signal_that_comes_while_a_run_starts_is_not_lost(prepared: Prepared, tmp_path: Path) -> None:
    """SIGUSR1 as soon as the process holds it back, long before it has read its configuration."""
    process = start("train", prepared.config_file(tmp_path / "run"))
    deadline = time.monotonic() + 30
    while not blocks_usr1(process.pid) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "told to stop before training began; the same command goes on" in err


def blocks_usr1(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (signal.SIGUSR1 - 1) & 1)


def wait_for_steps(run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and len(metrics_so_far(run_dir)) >= steps:
            return
        time.sleep(0.02)
    raise AssertionError("the run made no steps within a minute")


def metrics_so_far(run_dir: Path) -> list[str]:
    return [line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if '"step", "step"' in line]


@pytest.mark.parametrize(
    "steps", [pytest.param(1, marks=pytest.mark.long), 5, pytest.param(12, marks=pytest.mark.long)]
)
def test_killed_with_sigkill_and_started_again_a_run_ends_bitwise_as_if_undisturbed(
    prepared: Prepared, whole: Path, tmp_path: Path, steps: int
) -> None:
    run_dir = tmp_path / "run"
    config = prepared.config_file(run_dir)
    process = start("train", config)
    wait_for_steps(run_dir, steps)
    process.kill()
    process.communicate(timeout=60)
    assert train(load([config])) == "done"
    assert last_state(run_dir) == last_state(whole)
    assert losses(run_dir) == losses(whole)
    assert [record["step"] for record in metrics(run_dir, "step")] == list(range(1, 21))


def test_a_damaged_checkpoint_is_passed_over_for_the_newest_good_one(
    prepared: Prepared, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    weights = run_dir / "checkpoints" / "step-00000020" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    (run_dir / "checkpoints" / "step-00000015" / "manifest.json").unlink()
    (run_dir / "config.yaml").unlink()  # each checkpoint carries one, too
    with pytest.raises(ConfigError, match="with seed 0, and this configuration has 1"):
        train(from_tree(prepared.tree(run_dir, seed=1)))
    assert train(from_tree(prepared.tree(run_dir))) == "done"
    assert "passing over a damaged checkpoint" in capsys.readouterr().err
    assert last_state(run_dir) == last_state(whole)
    assert losses(run_dir) == losses(whole)


def test_checkpoints_that_are_all_damaged_stop_the_run_instead_of_starting_it_anew(
    prepared: Prepared, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for path in list_checkpoints(run_dir):
        (path / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 4 checkpoints, and every one is damaged"):
        train(from_tree(prepared.tree(run_dir)))
    assert losses(run_dir) == losses(whole)


def test_the_checkpoint_just_made_is_never_pruned_for_a_damaged_one_beyond_it(
    prepared: Prepared, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for path in list_checkpoints(run_dir)[2:]:  # at steps 15 and 20
        (path / "state.json").write_text("{")
    tree = prepared.tree(run_dir, checkpoint={"every_steps": 1, "keep_last": 1})
    stop_after(from_tree(tree), steps=14)
    assert [path.name for path in list_checkpoints(run_dir)] == [f"step-000000{n}" for n in (12, 14, 15, 20)]
    assert train(from_tree(tree)) == "done"
    assert last_state(run_dir) == last_state(whole)


def test_an_evaluation_that_a_kill_cut_off_is_made_up_for(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert '"at": "end"' in lines[-1]
    (run_dir / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert train(from_tree(prepared.tree(run_dir))) == "done"
    assert metrics(run_dir, "evaluation")[-1]["sources"] == metrics(whole, "evaluation")[-1]["sources"]


def test_a_second_run_is_kept_out_of_a_run_directory(prepared: Prepared, whole: Path) -> None:
    with alone_in(whole, "a test"), pytest.raises(DataError, match="another run is at work there"):
        train(from_tree(prepared.tree(whole)))


def test_of_two_runs_that_begin_at_once_in_a_new_directory_one_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    phases = [{**prepared.tree(tmp_path)["phases"][0], "steps": 400}]
    config = prepared.config_file(tmp_path / "run", phases=phases)
    processes = [start("train", config, f"seed={seed}") for seed in (0, 7)]
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    statuses = sorted(status for _, status in ended)
    assert statuses == [0, 2], ended
    # The one that comes second is kept out by the lock, or, if it comes late, by what the first one has written.
    assert all("another run" in err or "holds a run" in err for err, status in ended if status == 2)
    assert len(metrics(tmp_path / "run", "step")) == 400


def test_an_evaluation_under_way_gives_way_to_a_signal_and_the_step_is_saved(
    prepared: Prepared, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megacl.engine import Engine

    original = Engine.nats
    calls = []

    def nats(self: Any, tokens: Any, targets: Any) -> float:
        calls.append(1)
        if len(calls) == 5:  # the second batch of the first interval's evaluation
            signal.raise_signal(signal.SIGUSR1)
        return original(self, tokens, targets)

    monkeypatch.setattr(Engine, "nats", nats)
    tree = prepared.tree(tmp_path / "run", evaluation={"every_steps": 4, "sequences": 8, "micro_batch_size": 4})
    assert train(from_tree(tree)) == "stopped"
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000004"]
    assert [record["step"] for record in metrics(tmp_path / "run", "evaluation")] == [0]
    assert train(from_tree(tree)) == "done"
    assert [record["step"] for record in metrics(tmp_path / "run", "evaluation")] == [0, 4, 8, 12, 16, 20]
    assert last_state(tmp_path / "run") == last_state(whole)


def test_going_on_records_nothing_for_a_source_of_which_nothing_is_held_out(prepared: Prepared, tmp_path: Path) -> None:
    prepare(
        [str(prepared.documents["german"])],
        tokenizer=load_tokenizer(prepared.tokenizer),
        out=tmp_path / "all",
        validation=0,
    )
    tree = prepared.tree(tmp_path / "run")
    tree["sources"]["all"] = {"path": str(tmp_path / "all")}
    assert train(from_tree(tree)) == "done"
    before = metrics(tmp_path / "run", "evaluation")
    assert train(from_tree(tree)) == "done"
    assert metrics(tmp_path / "run", "evaluation") == before
    assert all(record["sources"] for record in before)


def test_a_source_that_an_appended_phase_brings_is_evaluated_before_it(prepared: Prepared, tmp_path: Path) -> None:
    tree = prepared.tree(tmp_path / "run")
    phases, german = tree["phases"], tree["sources"].pop("german")
    tree["phases"] = phases[:1]
    train(from_tree(tree))
    tree["phases"], tree["sources"]["german"] = phases, german
    train(from_tree(tree))
    seen = [(record["step"], sorted(record["sources"])) for record in metrics(tmp_path / "run", "evaluation")]
    assert seen == [(0, ["english"]), (12, ["english"]), (12, ["german"]), (20, ["english", "german"])]


def test_what_killed_saves_left_is_swept_away(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "checkpoints" / ".step-00000099.0123456789abcdef.tmp").mkdir()
    train(from_tree(prepared.tree(run_dir)))
    assert not list((run_dir / "checkpoints").glob(".*.tmp"))


def test_a_signal_while_data_is_prepared_ends_with_75(prepared: Prepared, tmp_path: Path) -> None:
    raw = write_documents(tmp_path / "raw.jsonl", [f"{number} " * 300 for number in range(20_000)])
    sources = {"english": {"path": str(tmp_path / "data"), "documents": [str(raw)], "validation": 0.1}}
    config = prepared.config_file(
        tmp_path / "run",
        sources=sources,
        tokenizer={"path": str(prepared.tokenizer)},
        phases=prepared.tree(tmp_path)["phases"][:1],
    )
    process = start("train", config)
    deadline = time.monotonic() + 60
    while not (tmp_path / "data" / ".prepare").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "told to stop before training began" in err
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_torn_last_line_of_metrics_is_done_again(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = from_tree(prepared.tree(run_dir))
    stop_after(config, steps=7)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 8, "lo')
    assert train(config) == "done"
    assert losses(run_dir) == losses(whole)


# ---------------------------------------------------------------------------------------------- phases and parents


def test_a_phase_appended_to_a_finished_run_is_as_if_it_had_been_there_from_the_start(
    prepared: Prepared, whole: Path, tmp_path: Path
) -> None:
    tree = prepared.tree(tmp_path / "run")
    phases = tree["phases"]
    tree["phases"] = phases[:1]
    train(from_tree(tree))
    tree["phases"] = phases
    train(from_tree(tree))
    assert last_state(tmp_path / "run") == last_state(whole)
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.parametrize(
    "reference", ["{parent}", "{parent}@english", "{parent}@12", "{parent}/checkpoints/step-00000012"]
)
def test_a_run_that_starts_from_another_is_as_if_it_were_that_runs_next_phase(
    prepared: Prepared, whole: Path, tmp_path: Path, reference: str
) -> None:
    parent = whole
    if reference == "{parent}":  # the newest checkpoint of a run that ends there
        parent = tmp_path / "parent"
        tree = prepared.tree(parent)
        tree["phases"] = tree["phases"][:1]
        train(from_tree(tree))
    tree = prepared.tree(tmp_path / "child", start_from=reference.format(parent=parent))
    tree["phases"] = tree["phases"][1:]
    train(from_tree(tree))
    assert last_state(tmp_path / "child") == last_state(whole)
    assert losses(tmp_path / "child") == losses(whole)[12:]
    assert metrics(tmp_path / "child", "step")[-1]["tokens"] == metrics(whole, "step")[-1]["tokens"]
    lineage, origin = load_lineage(tmp_path / "child"), checkpoint_path(parent, 12)
    assert [phase.run for phase in lineage.phases] == [parent.name, "child"]
    (branch,) = lineage.events
    assert isinstance(branch, BranchRecord)
    assert (branch.after, branch.checkpoint) == (1, mark_of(open_checkpoint(origin)))
    assert branch.checkpoint.weights == TensorFiles(origin).hash_weights()
    assert (branch.checkpoint.run, branch.checkpoint.step) == (parent.name, 12)
    assert lineage.ids[0] == branch.checkpoint.id == load_lineage(origin).id
    before = metrics(tmp_path / "child", "evaluation")[0]
    assert before["at"] == "start"
    assert before["sources"] == metrics(whole, "evaluation")[1]["sources"]


def test_the_optimizer_goes_on_with_infinite_and_constant_schedules_and_begins_anew_with_rewarming(
    prepared: Prepared, tmp_path: Path
) -> None:
    def phase(name: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "mixture": {"english": 1}, "steps": 2, **more}

    cosine = {"kind": "cosine", "max_lr": 1e-3}
    constant = {"kind": "constant", "max_lr": "last"}
    infinite = {"kind": "infinite", "max_lr": 1e-3, "constant_lr": 5e-4, "warmup": "0 steps", "cooldown": "1 step"}
    tree = prepared.tree(tmp_path / "run")
    tree["phases"] = [
        phase("a", schedule=cosine),
        phase("b", schedule=constant),
        phase("c", schedule=infinite),
        phase("d", schedule=cosine),
        phase("e", schedule=cosine, optimizer_state="keep"),
        phase("f", schedule=constant, optimizer_state="reset"),
    ]
    train(from_tree(tree))
    recorded = [record.optimizer_state for record in load_lineage(tmp_path / "run").phases]
    assert recorded == ["new", "kept", "kept", "reset", "kept", "reset"]
    counts = {open_checkpoint(path).lineage.phases[-1].name: path for path in list_checkpoints(tmp_path / "run")}
    steps = {name: open_checkpoint(path).state.optimizer_step for name, path in counts.items()}
    assert steps == {"a": 2, "b": 4, "c": 6, "d": 2, "e": 4, "f": 2}
    rates = [record["lr"] for record in metrics(tmp_path / "run", "step")]
    assert rates[2:4] == [0.1 * 1e-3] * 2


def test_a_model_from_elsewhere_replays_a_source_that_its_user_names(prepared: Prepared, tmp_path: Path) -> None:
    tree = prepared.tree(tmp_path / "run")
    tree["phases"] = tree["phases"][1:]
    tree["phases"][0]["replay"] = {"share": 0.25, "from_sources": {"english": 1}}
    train(from_tree(tree))
    replay = load_lineage(tmp_path / "run").phases[0].replay
    assert replay is not None
    assert [(source.name, source.samples) for source in replay.from_sources] == [("english", 24)]


def test_phases_of_other_lengths_and_batches_replay_the_stream_cut_anew(prepared: Prepared, tmp_path: Path) -> None:
    tree = prepared.tree(tmp_path / "run")
    tree["phases"][1] |= {"seq_length": 64, "global_batch_size": 4}
    train(from_tree(tree))
    english, german = load_lineage(tmp_path / "run").phases
    assert (english.tokens, german.tokens) == (12 * 12 * 32, 8 * 4 * 64)
    assert german.replay is not None
    assert german.replay.from_[0].tokens == 8 * 64


# ---------------------------------------------------------------------------------------------- what must not go on


def refusal(prepared: Prepared, run_dir: Path, change: Any) -> str:
    tree = prepared.tree(run_dir)
    change(tree)
    with pytest.raises((ConfigError, DataError, CheckpointError)) as caught:
        train(from_tree(tree))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(seed=1), "with seed 0, and this configuration has 1"),
        (lambda tree: tree["model"].update(hidden_size=64), "with model.hidden_size 32, and this configuration has 64"),
        (lambda tree: tree.update(optimizer={"beta2": 0.9}), "with optimizer.beta2 0.95"),
        (lambda tree: tree["phases"][0]["schedule"].update(max_lr=1e-3), "with phases[0].schedule.max_lr 0.005"),
        (lambda tree: tree["phases"][0].update(steps=13), "with phases[0].steps 12, and this configuration has 13"),
        (lambda tree: tree["phases"][1]["replay"].update(share=0.5), "with phases[1].replay.share 0.25"),
        (lambda tree: tree["phases"][1].update(mixture={"english": 1}), "with phases[1].mixture.german 1.0"),
        (lambda tree: tree.update(global_batch_size=6), "with phases[0].global_batch_size 12"),
        (lambda tree: tree.update(phases=tree["phases"][:1]), "has begun 2 phases, and this configuration has 1"),
    ],
)
def test_a_run_directory_of_another_configuration_says_what_differs(
    prepared: Prepared, whole: Path, change: Any, message: str
) -> None:
    assert message in refusal(prepared, whole, change)


def test_what_is_not_the_run_itself_may_change(prepared: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = from_tree(prepared.tree(run_dir))
    stop_after(config, steps=7)
    tree = prepared.tree(
        run_dir,
        engine={"micro_batch_size": 6, "activation_checkpointing": "full", "loss_chunk": 64},
        checkpoint={"every_steps": 3, "keep_last": None},
        evaluation={"every_steps": 4, "sequences": 4},
        logging={"every_steps": 1, "tensorboard": False},
    )
    tree["phases"][1]["steps"] = 3  # has not begun
    assert train(from_tree(tree)) == "done"
    assert len(metrics(run_dir, "step")) == 15


def test_without_resume_a_run_that_is_there_is_not_touched(prepared: Prepared, whole: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a run already; leave out --no-resume"):
        train(from_tree(prepared.tree(whole)), resume=False)


def test_data_that_is_another_under_the_same_name_stops_a_run_that_has_begun(
    prepared: Prepared, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    message = refusal(
        prepared, run_dir, lambda tree: tree["sources"].update(english={"path": str(prepared.sources["german"])})
    )
    assert "phase 'english' has begun with" in message
    assert open_source(prepared.sources["english"]).fingerprint[:12] in message
    message = refusal(prepared, run_dir, lambda tree: tree["sources"]["english"].update(window=3))
    assert "sources.english.window is 3, and phase 'english' has begun with None; put that back" in message


def test_data_that_a_begun_phase_replays_by_name_stops_the_run_where_it_is_another(
    prepared: Prepared, tmp_path: Path
) -> None:
    def replay(tree: dict[str, Any]) -> None:
        tree["phases"] = [{**tree["phases"][1], "steps": 3, "replay": {"share": 0.25, "from_sources": {"english": 1}}}]

    def replay_other_data(tree: dict[str, Any]) -> None:
        replay(tree)
        tree["sources"]["english"]["path"] = str(prepared.sources["german"])

    def replay_in_windows(tree: dict[str, Any]) -> None:
        replay(tree)
        tree["sources"]["english"]["window"] = 3

    tree = prepared.tree(tmp_path / "run")
    replay(tree)
    assert train(from_tree(tree)) == "done"
    message = refusal(prepared, tmp_path / "run", replay_other_data)
    assert "source 'english'" in message
    assert "phase 'german' has begun with" in message
    message = refusal(prepared, tmp_path / "run", replay_in_windows)
    assert "sources.english.window is 3, and phase 'german' has begun with None; put that back" in message


def test_a_model_of_another_shape_cannot_go_on(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree.update(start_from=f"{whole}@english", phases=tree["phases"][1:])
        tree["model"]["num_layers"] = 3

    assert "model.num_layers is 3, and in" in refusal(prepared, tmp_path / "run", change)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    message = refusal(prepared, tmp_path / "run", lambda tree: tree["model"].update(vocab_size=500))
    assert "model.vocab_size is 500; it must be at least the tokenizer's, 600." in message


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(
    prepared: Prepared, tmp_path: Path
) -> None:
    tree = prepared.tree(tmp_path / "run")
    tree["phases"][1]["schedule"] = {"kind": "constant", "max_lr": 1e30}
    with pytest.raises(DivergedError, match=r"step \d+: the (loss|gradient) is not finite.*step-00000012") as caught:
        train(from_tree(tree))
    assert caught.value.exit_status == 1
    final = find_checkpoint(str(tmp_path / "run"), pytest.fail)
    assert all(np.isfinite(np.frombuffer(tensor, dtype=np.float32)).all() for tensor in state(final).values())
    steps = metrics(tmp_path / "run", "step")
    assert f"step {steps[-1]['step']}: " in str(caught.value)
    assert [step["applied"] for step in steps] == [True] * (len(steps) - 1) + [False]


def test_weights_that_are_not_finite_are_never_saved(prepared: Prepared, tmp_path: Path) -> None:
    tree = prepared.tree(tmp_path / "run")
    tree["phases"][1] |= {"steps": 1, "schedule": {"kind": "constant", "max_lr": 1e39}}
    with pytest.raises(DivergedError, match=r"step 13: .* is not finite.*the last good one is .*step-00000012"):
        train(from_tree(tree))
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-00000012"


def test_a_held_out_loss_that_is_not_finite_is_recorded_as_null_and_ends_the_run(
    prepared: Prepared, tmp_path: Path
) -> None:
    tree = prepared.tree(tmp_path / "run")
    tree["phases"][1] |= {"steps": 1, "schedule": {"kind": "constant", "max_lr": 1e25}}
    with pytest.raises(DivergedError, match="the held-out loss of english, german is not finite"):
        train(from_tree(tree))
    evaluations = metrics(tmp_path / "run", "evaluation")
    assert evaluations[-1]["sources"]["german"]["loss"] is None
    matrix = read_matrix(tmp_path / "run")
    assert all(math.isnan(matrix.forgetting(source) or 0.0) for source in ("english", "german"))


def test_records_stay_json_where_numbers_are_not_finite(prepared: Prepared, tmp_path: Path) -> None:
    tree = prepared.tree(tmp_path / "run")
    tree["phases"] = [{**tree["phases"][0], "steps": 3}]
    train(from_tree(tree))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
