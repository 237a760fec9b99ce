"""A small study for tests: two arms and two seeds, seconds each."""

from pathlib import Path
from typing import Any

import yaml
from conftest import Prepared

SCHEDULE = {"kind": "cosine", "max_lr": 5e-3, "warmup": "2 steps"}


def study_of(prepared: Prepared, **changes: Any) -> dict[str, Any]:
    """Two arms and two seeds: English, then German without replay and with a quarter of it."""
    base = prepared.tree(Path("unused"))
    for key in ("run_dir", "phases"):
        del base[key]
    german = {"mixture": {"german": 1}, "steps": 4, "schedule": SCHEDULE}
    return {
        "name": "small",
        "question": "Does replay keep <English>?",
        "budget": "seconds",
        "seeds": [0, 1],
        "base": base,
        "phases": {
            "english": {"mixture": {"english": 1}, "steps": 6, "schedule": SCHEDULE},
            "german-0": german,
            "german-25": {**german, "replay": {"share": 0.25}},
        },
        "arms": {
            "replay-0": {"phases": ["english", "german-0"]},
            "replay-25": {"phases": ["english", "german-25"]},
        },
        "bars": [
            {"claim": "German is learned", "holds": 'loss("replay-25", "german") < loss("replay-25", "english") + 99'},
            {"claim": "nothing is learned", "holds": 'loss("replay-0", "german") < 0.1', "control": True},
            {"claim": "a mean", "holds": 'mean("replay-0") <= 100', "reported": "2.34 | 1.75"},
        ],
        **changes,
    }


def write_study(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)
