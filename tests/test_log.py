"""metrics.jsonl: a record a line, read back; a crash in the middle of a line costs that line alone."""

import json
import math
from pathlib import Path

import pytest

from megacl.errors import CheckpointError
from megacl.log import RunLog, read_metrics


def open_log(run_dir: Path, rank: int = 0, *, tensorboard: bool = False) -> RunLog:
    run_dir.mkdir(exist_ok=True)
    return RunLog(run_dir, rank=rank, every_steps=2, tensorboard=tensorboard)


def test_records_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.record("step", step=1, loss=2.5)
    assert [(r["kind"], r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [("step", 1, 2.5)]
    log.close()


def test_only_rank_0_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path, rank=1)
    log.record("step", step=1)
    log.say("hello")
    log.warn("hello")
    log.progress(2, 2, "text")
    log.keep_until(0)
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_what_came_after_a_step_is_forgotten(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in range(1, 6):
        log.record("step", step=step)
    log.record("evaluation", step=5)
    log.close()
    log = open_log(tmp_path)
    log.keep_until(3)
    log.record("step", step=4)
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_torn_last_line_is_passed_over_and_a_broken_one_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1]
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: line 2 is not a record"):
        list(read_metrics(path))
    assert list(read_metrics(tmp_path / "none.jsonl")) == []


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.record("evaluation", step=1, sources={"a": {"loss": float("nan"), "perplexity": float("inf"), "tokens": 3}})
    log.close()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["sources"] == {"a": {"loss": None, "perplexity": None, "tokens": 3}}


@pytest.mark.parametrize("line", [b"[1]", b"\xff", b'{"step": "1"}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: line 2 is not a record"):
        list(read_metrics(tmp_path / "metrics.jsonl"))


def test_a_plain_terminal_gets_a_line_at_intervals_and_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = open_log(tmp_path)
    for step in range(1, 6):
        log.progress(step, 5, f"loss {step}")
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 2/5", "loss 2"],
        ["step 4/5", "loss 4"],
        ["step 5/5", "loss 5"],
    ]
    assert all(line.endswith(" left") for line in lines)


def test_text_with_brackets_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    log.warn("phases[0] reads [bold]twice[/bold]")
    assert capsys.readouterr().err == "warning: phases[0] reads [bold]twice[/bold]\n"


def test_tensorboard_gets_the_same_numbers_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'megacl[track]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path, tensorboard=True)
    log.record("step", step=1, loss=2.5, lr=1e-3, grad_norm=None, log_z=4.5, tokens_per_second=10.0)
    part = {"grad_norm": 0.5, "update_to_weight": math.nan}
    log.record("monitor", step=1, log_z=4.5, layers=[{**part, "attention_logit_max": 6.5}], embed=part)
    log.record("evaluation", step=1, sources={"english": {"loss": 3.5}})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [2.5]
    assert [event.value for event in events.Scalars("train/log_z")] == [4.5]
    assert [event.value for event in events.Scalars("attention_logit_max/layers.0")] == [6.5]
    assert [event.value for event in events.Scalars("grad_norm/embed")] == [0.5]
    assert not any(tag.startswith("update_to_weight") for tag in events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("loss/english")] == [3.5]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"] is None
