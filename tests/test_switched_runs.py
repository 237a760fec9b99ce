"""Runs with the switches for stability on, against a plain loop over the same samples; runs that are looked into."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Prepared
from runs import losses, metrics
from torch.nn import functional

from megacl.configfile import from_tree, load
from megacl.data.stream import PhaseStream, open_recorded
from megacl.engine import monitors
from megacl.lineage import Lineage, load_lineage
from megacl.model.gpt import build_model
from megacl.trainer import train


def test_a_run_with_the_switches_on_follows_a_plain_loop(prepared: Prepared, tmp_path: Path) -> None:
    """Normed heads, z-loss, and a decay of 0.008 x the schedule's shape, whatever its peak."""
    tree = prepared.tree(tmp_path / "run")
    tree["model"]["qk_norm"] = "layer_norm"
    tree["optimizer"] = {"z_loss": 1e-2, "independent_weight_decay": True, "weight_decay": 0.008}
    tree["phases"][1]["schedule"] = {**tree["phases"][1]["schedule"], "max_lr": 2e-3}
    assert train(from_tree(tree)) == "done"

    config = load([str(tmp_path / "run" / "config.yaml")])
    model = build_model(config.model, seed=config.seed)
    lineage, steps, expected = load_lineage(tmp_path / "run"), metrics(tmp_path / "run", "step"), []
    for index, (phase, peak) in enumerate(zip(lineage.phases, [5e-3, 2e-3], strict=True)):
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        stream = PhaseStream(Lineage(phases=lineage.phases[: index + 1]), open_recorded)
        for first in range(0, phase.samples, phase.global_batch_size):
            tokens = torch.from_numpy(stream.read(np.arange(first, first + phase.global_batch_size)))
            record = steps[len(expected)]
            logits = model(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            squares = logits.logsumexp(-1).square().mean()
            assert record["log_z"] == pytest.approx(squares.item() ** 0.5, rel=1e-4)
            expected.append(loss.item())
            optimizer.zero_grad()
            (loss + 1e-2 * squares).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter *= 1 - 0.008 * record["lr"] / peak
            optimizer.param_groups[0]["lr"] = record["lr"]
            optimizer.step()
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4)


def test_a_run_is_looked_into_at_its_interval(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = prepared.tree(tmp_path / "plain")
    looked = prepared.tree(tmp_path / "looked")
    looked["logging"]["monitor_every_steps"] = 5
    for tree in (plain, looked):
        assert train(from_tree(tree)) == "done"
    assert losses(tmp_path / "plain") == losses(tmp_path / "looked")
    assert not metrics(tmp_path / "plain", "monitor")
    records, steps = metrics(tmp_path / "looked", "monitor"), metrics(tmp_path / "looked", "step")
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    assert [record["phase"] for record in records] == ["english", "english", "german", "german"]
    for record in records:
        step = steps[record["step"] - 1]
        assert record["log_z"] == step["log_z"]
        assert len(record["layers"]) == looked["model"]["num_layers"]
        parts = [*record["layers"], record["embed"], record["final_norm"], record["head"]]
        assert sum(part["grad_norm"] ** 2 for part in parts) == pytest.approx(step["grad_norm"] ** 2, rel=1e-5)
        assert all(0 < part["update_to_weight"] < 1 for part in parts)
    assert "attention's largest logit" not in capsys.readouterr().err


def test_logits_of_attention_that_run_away_are_warned_about_once(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(monitors, "LOGIT_ALARM", 1e-6)
    tree = prepared.tree(tmp_path / "run")
    tree["logging"]["monitor_every_steps"] = 10
    train(from_tree(tree))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "attention's largest logit" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: step 10: attention's largest logit is ")
    largest = [layer["attention_logit_max"] for layer in metrics(tmp_path / "run", "monitor")[0]["layers"]]
    assert f"in layer {largest.index(max(largest))}, and runs in which it reaches 1e4 diverge" in warnings[0]
