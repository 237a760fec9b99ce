"""Reptile where steps go wrong: a skipped update does not shift its moves, a way back brings its anchor back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Prepared
from runs import losses, metrics, state

from megacl.checkpoint import checkpoint_path
from megacl.configfile import from_tree
from megacl.model.gpt import build_model
from tests.test_guard import BACK, THREE, batches, open_config, train, tree

pytestmark = pytest.mark.usefixtures("one_thread")


def test_moves_count_batches_taken_so_that_a_skipped_update_does_not_shift_them(
    prepared: Prepared, tmp_path: Path
) -> None:
    """Every fourth of 14 steps; the gradients of the fourth and the sixth are not finite."""
    run_dir = tmp_path / "run"
    settings = tree(prepared, run_dir, stability={"skip": 1})
    settings["phases"][0] |= {"steps": 14, "reptile": {"every_steps": 4, "epsilon": 0.3}}
    assert train(settings, {4: "broken", 6: "broken"}) == "done"
    config = from_tree(open_config(run_dir))
    model = build_model(config.model, seed=config.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95), eps=1e-8)
    anchor = [p.detach().clone() for p in model.parameters()]
    expected = []
    for step in range(1, 15):
        tokens = torch.from_numpy(batches(run_dir, step))
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step not in (4, 6):
            optimizer.step()
        if step % 4 == 0:
            with torch.no_grad():
                for old, p in zip(anchor, model.parameters(), strict=True):
                    p.copy_(old + 0.3 * (p - old))
            anchor = [p.detach().clone() for p in model.parameters()]
    np.testing.assert_allclose(losses(run_dir), expected, rtol=1e-5)


@pytest.mark.parametrize("every", [10, 8])
def test_going_back_brings_back_the_anchor_of_the_checkpoint(prepared: Prepared, tmp_path: Path, every: int) -> None:
    """From step 23 to 16. With 10 it lies between two moves, one of which is undone; with 8 the last move was there."""
    run_dir = tmp_path / "run"
    checkpoint = {"every_steps": 8, "keep_last": None}
    settings = tree(prepared, run_dir, checkpoint=checkpoint, stability={**BACK["stability"], "spike": 8.0})
    settings["phases"][0]["reptile"] = {"every_steps": every, "epsilon": 0.8}
    assert train(settings, {step: "broken" for step in THREE if step > 20}) == "done"
    assert [(record["step"], record["to_step"]) for record in metrics(run_dir, "go_back")] == [(23, 16)]
    at_16, at_23 = (state(checkpoint_path(run_dir, step)) for step in (16, 23))
    assert at_23 == at_16
    assert any(key.startswith("anchor.") for key in at_16) == (every == 10)


STATE = ("exp_avg", "exp_avg_sq", "anchor")


def test_a_phase_that_has_saved_nothing_goes_back_to_an_anchor_where_it_began(
    prepared: Prepared, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = tree(prepared, run_dir, **BACK)
    first = settings["phases"][0] | {"steps": 4, "reptile": {"every_steps": 3, "epsilon": 0.5}}
    settings["phases"] = [first, first | {"name": "second", "steps": 8}]
    settings["checkpoint"] = {"every_steps": 100}
    assert train(settings, {6: "broken", 7: "broken", 8: "broken"}) == "done"
    at_8, at_4 = (state(checkpoint_path(run_dir, step)) for step in (8, 4))
    assert {key: value for key, value in at_8.items() if key.partition(".")[0] not in STATE} == {
        key: value for key, value in at_4.items() if key.partition(".")[0] not in STATE
    }
    assert not any(key.startswith("anchor.") for key in at_8)
