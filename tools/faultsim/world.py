"""What the rounds of a campaign share: small data, a run's configuration, and what undisturbed commands make of them.

The commands are processes, as a user starts them. The model is so small that a step takes milliseconds, and a command
a few seconds, nearly all of them its start.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import megacl
from faultsim.checks import contents_of, end_of, steps_recorded
from megacl.configfile import shipped
from megacl.data.documents import read_documents
from megacl.data.prepare import prepare
from megacl.data.tokenizer_training import train_tokenizer

INTERVAL = 5
"""Optimizer steps between two saves."""
PHASES = {"english": 33, "german": 27}
"""The steps of each: one phase ends between two saves in turn, the other with one."""
STEPS = sum(PHASES.values())
ENDS = tuple(itertools.accumulate(PHASES.values()))
SAVES = tuple(sorted({*range(INTERVAL, STEPS + 1, INTERVAL), *ENDS}))
"""The steps behind which an undisturbed run saves."""
KEPT = 2
"""checkpoint.keep_last of the disturbed runs."""
PATIENCE = 300.0
"""Seconds after which a command hangs."""

_DOCUMENTS, _CHARACTERS, _PIECES = 160, 700, 600


class World:
    """The data of a campaign, and the folder in which its rounds are played."""

    def __init__(self, folder: Path, program: Sequence[str] = (sys.executable, "-m", "megacl")) -> None:
        """Makes the data, a second's work.

        folder: an empty one, on a disk. program: the command that rounds disturb, megacl's but in a test of the
        campaign itself; what is undisturbed is megacl's always.
        """
        self.folder, self.program = folder.resolve(), tuple(program)
        files = {}
        for language, name in (("english", "english_a"), ("german", "german")):
            texts = itertools.islice(
                read_documents([str(shipped("examples") / "data" / f"{name}.jsonl.zst")]), _DOCUMENTS
            )
            lines = [json.dumps({"text": text[:_CHARACTERS]}, ensure_ascii=False) + "\n" for text in texts]
            files[language] = self.folder / f"{language}.jsonl"
            files[language].write_text("".join(lines), encoding="utf-8")
        tokenizer = train_tokenizer([str(file) for file in files.values()], self.folder / "tokenizer.model", _PIECES)
        for language, file in files.items():
            prepare([str(file)], tokenizer=tokenizer, out=self.folder / language, validation=0.2, workers=1)

    def config_file(self, run_dir: Path, keep_last: int | None = KEPT) -> str:
        """The configuration of the run, in a file beside its directory."""
        schedule = {"kind": "cosine", "max_lr": 5e-3, "warmup": "2 steps"}
        phases: list[dict[str, Any]] = [
            {"name": name, "mixture": {name: 1}, "steps": steps, "schedule": schedule} for name, steps in PHASES.items()
        ]
        phases[1]["replay"] = {"share": 0.25}
        tree = {
            "run_dir": str(run_dir),
            "sources": {name: {"path": str(self.folder / name)} for name in PHASES},
            "model": {"vocab_size": 640, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2},
            "seq_length": 32,
            "global_batch_size": 12,
            "phases": phases,
            "checkpoint": {"every_steps": INTERVAL, "keep_last": keep_last},
            "evaluation": {"every_steps": 2 * INTERVAL, "sequences": 4},
            "logging": {"every_steps": 1, "tensorboard": False},
        }
        path = run_dir.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    def start(
        self, arguments: Sequence[str], log: Path, program: Sequence[str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """A command as a process in the folder of `log`, a new file for all that it prints."""
        paths = [str(Path(megacl.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),  # the megacl that is imported here
            "CUDA_VISIBLE_DEVICES": "",  # on a CPU, and with as many threads, the result is the same to the last bit
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        command = [*(program or self.program), *arguments]
        with open(log, "wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)

    def _undisturbed(self, *arguments: str, inside: Path, watch: Path) -> float:
        """Runs a command in a folder, to its end: the seconds until `watch` was there."""
        log = inside / "undisturbed.log"
        begun, seen = time.monotonic(), 0.0
        process = self.start(arguments, log, (sys.executable, "-m", "megacl"))
        while process.poll() is None:
            if not seen and watch.exists():
                seen = time.monotonic() - begun
            if time.monotonic() - begun > PATIENCE:
                process.kill()
            time.sleep(0.001)
        if process.returncode:
            raise RuntimeError(f"undisturbed, `megacl {' '.join(arguments)}` failed: {log.read_text()}")
        return seen

    @functools.cached_property
    def _trained(self) -> tuple[Path, float]:
        run_dir = self.folder / "undisturbed" / "run"  # a lineage holds the folder's name
        run_dir.parent.mkdir(parents=True)
        config = self.config_file(run_dir, keep_last=None)
        seconds = self._undisturbed("train", config, inside=run_dir.parent, watch=run_dir / "metrics.jsonl")
        assert steps_recorded(run_dir) == STEPS
        return run_dir, seconds

    @property
    def run_dir(self) -> Path:
        """An undisturbed run, which has kept all its checkpoints."""
        return self._trained[0]

    @property
    def start_up(self) -> float:
        """Seconds from a run's start to its first record."""
        return self._trained[1]

    @functools.cached_property
    def end(self) -> dict[str, Any]:
        """The undisturbed run's end, as checks.end_of has it."""
        return end_of(self.run_dir)

    def convert_arguments(self, to: str) -> list[str]:
        """The words of a conversion into model/: of the undisturbed run into many small files, or of these back."""
        if to == "hf":
            return ["convert", str(self.run_dir), "model", "--to", "hf", "--max-shard-size", "8KB"]
        return ["convert", str(self.converted("hf")[0]), "model", "--to", "megacl"]  # model: it stands in its config

    @functools.cache  # noqa: B019 (a world lives as long as its campaign)
    def converted(self, to: str) -> tuple[Path, dict[str, str], float]:
        """An undisturbed conversion: its folder, the hash of each file in it, and the seconds until it wrote."""
        words = self.convert_arguments(to)
        destination = self.folder / f"undisturbed-{to}" / "model"
        destination.parent.mkdir()
        seconds = self._undisturbed(*words, inside=destination.parent, watch=staging_of(destination))
        return destination, contents_of(destination), seconds


def staging_of(destination: Path) -> Path:
    """The hidden folder in which a conversion is made, files/ in it (megacl/convert/staging.py)."""
    return destination.with_name(f".{destination.name}.converting")
