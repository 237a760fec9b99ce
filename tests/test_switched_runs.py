"""Runs with the switches for stability on, against a plain loop over the same samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Prepared
from runs import losses, metrics
from torch.nn import functional

from megacl.configfile import from_tree, load
from megacl.data.stream import PhaseStream, open_recorded
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
