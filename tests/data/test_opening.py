"""Opening a source of 100,000 shards: no directory is listed, little memory is taken, one process does it for all."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from megacl.configfile import from_tree
from megacl.data.manifest import Generation, Manifest, TokenizerRecord, publish_manifest
from megacl.data.prepare import prepare
from megacl.data.shard_list import ShardList, ShardRow
from megacl.data.source import open_source
from megacl.data.stream import open_recorded
from megacl.data.tokenizer import load_tokenizer
from megacl.lineage import Lineage
from megacl.plan import plan_phases
from megacl.resume import Origin, find_inputs, open_sources
from tests.conftest import Prepared

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 100_000


def make_long_source(folder: Path, shards: int = SHARDS, tokens: int = 10**8) -> None:
    """The lists of a folder of so many shards; every hundredth holds validation documents. The shards are not there."""
    columns = {
        "path": [f"train-{index:05d}.arrow" for index in range(shards)],
        "split": ["validation" if index % 100 == 7 else "train" for index in range(shards)],
        "documents": np.full(shards, 1000),
        "tokens": np.full(shards, tokens),
        "text_bytes": np.full(shards, 4 * tokens),
        "size": np.full(shards, 3 * tokens),
        "offset": np.full(shards, 1000),
        "sha256": [index.to_bytes(32, "big") for index in range(shards)],
        "added": np.ones(shards, np.int32),
        "removed": np.zeros(shards, np.int32),
    }
    one = ShardList.of_rows([ShardRow("a", "train", 1, 1, 1, 1, 1, "0" * 64)])
    schema = pa.ipc.open_stream(one.dump()).schema
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    rows = ShardList(pa.Table.from_arrays(arrays, schema=schema))
    tokenizer = TokenizerRecord("tokenizer.model", "0" * 64, 32_000, 2)
    state = Generation(
        generation=1,
        shards=shards,
        train=rows.totals("train"),
        validation=rows.totals("validation"),
        fingerprint=rows.fingerprint("0" * 64, "uint16"),
        made_by="prepare",
        settings={},
    )
    folder.mkdir()
    publish_manifest(folder, Manifest("megacl-data", 2, "long", "uint16", tokenizer, 0.01, (state,)), rows, [])


def test_a_hundred_thousand_shards_open_without_listing_a_directory_and_in_little_memory(tmp_path: Path) -> None:
    make_long_source(tmp_path / "long")
    script = """
import os, resource, sys
import numpy as np
from megacl.data.source import open_source
from megacl.data.sequences import Sequences

def refuse(*arguments):
    raise AssertionError("a directory is listed")

os.listdir = os.scandir = refuse
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
before = peak()
source = open_source(sys.argv[1])
starts = Sequences(source, 2048, seed=0).starts(np.arange(16_383 * 64, 16_384 * 64))
assert (source.train.tokens, source.validation.tokens) == (99 * 10**11, 10**11), source.train.tokens
assert (starts + 2049 <= source.train.tokens).all() and len(np.unique(starts // 10**8)) > 60
assert peak() - before < 100_000, f"{peak() - before} KiB"
assert "pyarrow.compute" not in sys.modules, "its import takes longer than all else"
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "long")], cwd=ROOT, check=True)


def test_what_one_process_opened_another_plans_and_reads_with_without_the_lists(
    prepared: Prepared, tmp_path: Path
) -> None:
    folders = {name: tmp_path / name for name in prepared.sources}
    for name, folder in folders.items():
        shutil.copytree(prepared.sources[name], folder)
    sources = {name: {"path": str(folder)} for name, folder in folders.items()}
    config = from_tree(prepared.tree(tmp_path / "run", sources=sources))
    origin = Origin(None, None, None, Lineage())
    opened = open_sources(config, origin)
    expected = [stream.read(np.arange(50)) for _, stream, _ in plan_phases(find_inputs(config, origin, opened))]
    packed = pickle.dumps(opened)
    for folder in folders.values():
        (folder / "manifest.json").unlink()
        (folder / "shards.arrow").unlink()
    found = find_inputs(config, origin, pickle.loads(packed))
    for (_, stream, _), tokens in zip(plan_phases(found), expected, strict=True):
        np.testing.assert_array_equal(stream.read(np.arange(50)), tokens)


def test_a_phase_reads_only_what_a_new_generation_added_and_the_lineage_finds_it_again(
    prepared: Prepared, tmp_path: Path
) -> None:
    shutil.copytree(prepared.sources["english"], tmp_path / "both")
    tokenizer = load_tokenizer(prepared.tokenizer)
    prepare([str(prepared.documents["german"])], tokenizer=tokenizer, out=tmp_path / "both", validation=0.2)
    sources = {
        "english": {"path": str(tmp_path / "both"), "generation": 1},
        "german": {"path": str(tmp_path / "both"), "since": 1},
    }
    config, origin = from_tree(prepared.tree(tmp_path / "run", sources=sources)), Origin(None, None, None, Lineage())
    found = find_inputs(config, origin, open_sources(config, origin))
    (_, english, _), (_, german, lineage) = plan_phases(found)
    alone = open_source(prepared.sources["german"]).train
    assert german.sources[0].train.read(0, alone.tokens).tolist() == alone.read(0, alone.tokens).tolist()
    assert [(s.generation, s.since) for s in (english.record.sources[0], german.record.sources[0])] == [(1, 0), (2, 1)]
    for record in lineage.sources.values():
        assert open_recorded(record).fingerprint == record.fingerprint
