"""Shared by all tests: an environment that finds no GPU and no hub, and small prepared data of two languages."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `make test-gpu` says so. All else is tested on the CPU, also where there is a GPU, and Triton's kernels run in its
# interpreter; torch and Triton look at these when they are imported.
if "MEGACL_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
import yaml

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# A shell has what it starts in the background ignore SIGINT, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# An example may take long on a busy machine; how long is a matter for benchmarks.
hypothesis.settings.register_profile("megacl", deadline=None)
hypothesis.settings.load_profile("megacl")


@dataclass(frozen=True)
class Prepared:
    """Real documents, cut short, tokenized: 160 of English and 160 of German, a fifth of each held out."""

    folder: Path
    tokenizer: Path
    documents: dict[str, Path]
    sources: dict[str, Path]

    def tree(self, run_dir: Path, **changes: Any) -> dict[str, Any]:
        """A configuration of a very small run on this data: 12 steps of English, 8 of German with replay."""
        schedule = {"kind": "cosine", "max_lr": 5e-3, "warmup": "2 steps"}
        return {
            "run_dir": str(run_dir),
            "sources": {name: {"path": str(path)} for name, path in self.sources.items()},
            "model": {"vocab_size": 640, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2},
            "seq_length": 32,
            "global_batch_size": 12,
            "phases": [
                {"name": "english", "mixture": {"english": 1}, "steps": 12, "schedule": schedule},
                {
                    "name": "german",
                    "mixture": {"german": 1},
                    "steps": 8,
                    "schedule": schedule,
                    "replay": {"share": 0.25},
                },
            ],
            "checkpoint": {"every_steps": 5},
            "evaluation": {"sequences": 8},
            "logging": {"tensorboard": False},
            **changes,
        }

    def config_file(self, run_dir: Path, **changes: Any) -> str:
        """The same as a file beside the run directory."""
        path = run_dir.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(self.tree(run_dir, **changes)))
        return str(path)


def write_documents(path: Path, texts: list[str]) -> Path:
    """A JSONL file of texts."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    from megacl.configfile import shipped
    from megacl.data.documents import read_documents
    from megacl.data.prepare import prepare
    from megacl.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("prepared")
    documents = {}
    for language, name in (("english", "english_a"), ("german", "german")):
        texts = read_documents([str(shipped("examples") / "data" / f"{name}.jsonl.zst")])
        documents[language] = write_documents(
            folder / f"{language}.jsonl", [text[:700] for _, text in zip(range(160), texts, strict=False)]
        )
    tokenizer = train_tokenizer([str(path) for path in documents.values()], folder / "tokenizer.model", 600)
    sources = {}
    for language, path in documents.items():
        sources[language] = folder / language
        prepare([str(path)], tokenizer=tokenizer, out=sources[language], validation=0.2)
    return Prepared(folder, folder / "tokenizer.model", documents, sources)


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 300 pieces."""
    from megacl.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["the", "quick", "brown", "fox", "überall", "Straße", "12345", "====", "  spaces", "naïve", "ice cream"]
    text = "\n".join(" ".join(words[(i * j) % len(words)] for j in range(1, 9)) for i in range(200))
    (folder / "text.txt").write_text(text)
    train_tokenizer([str(folder / "text.txt")], folder / "tokenizer.model", 300)
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread computes, as in processes that share the cores: two would round otherwise."""
    import torch  # the environment above must be set before

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
