"""Sources on an S3 server: read as local ones are, through a cache that keeps its bound, with every failure named."""

import http.server
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs
from runs import WEIGHTS, command_line, losses

from megacl.attempts import read_outcome
from megacl.checkpoint import find_checkpoint, open_checkpoint
from megacl.configfile import from_tree
from megacl.data.loader import Loader
from megacl.data.manifest import Generation, Manifest, TokenizerRecord, publish_manifest
from megacl.data.shard_list import ShardList
from megacl.data.shards import join_documents, write_shard
from megacl.data.source import Source, _open_fetched, open_source
from megacl.data.store import ShardCache
from megacl.data.stream import PhaseStream
from megacl.data.tokenizer import load_tokenizer
from megacl.errors import ConfigError, DataError, UnreachableError
from megacl.evaluate import open_named, sources_of
from megacl.lineage import Lineage, load_lineage
from megacl.plan import plan_text
from megacl.publish import sha256_of
from megacl.trainer import train
from tests.conftest import Prepared
from tests.data.streams import begin, phase_config

ROOT = Path(__file__).resolve().parents[2]
SHARDS, TOKENS = 8, 4000


@pytest.fixture(scope="module", autouse=True)
def keys() -> Iterator[None]:
    names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**names, "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of eight training shards of 4,000 tokens and a held-out one."""
    path = tmp_path_factory.mktemp("local") / "data"
    path.mkdir()
    rng, rows = np.random.default_rng(0), []
    for index in range(SHARDS + 1):
        split = "train" if index < SHARDS else "validation"
        tokens = [np.append(rng.integers(3, 500, TOKENS // 10 - 1), 2).astype(np.uint16) for _ in range(10)]
        hashes = [100 * index + k + (2**62 if split == "train" else 0) for k in range(10)]
        documents = join_documents(tokens, "uint16", text_bytes=[9] * 10, hashes=hashes)
        row = write_shard(path / f"{split}-{index:05d}.arrow", documents, split=split)
        rows.append(type(row)(**{**vars(row), "added": 1}))
    (path / "tokenizer.model").write_bytes(b"stands for a tokenizer")
    tokenizer = sha256_of(path / "tokenizer.model")
    shards = ShardList.of_rows(rows)
    state = Generation(
        generation=1,
        shards=len(rows),
        train=shards.totals("train"),
        validation=shards.totals("validation"),
        fingerprint=shards.fingerprint(tokenizer, "uint16"),
        made_by="prepare",
        settings={},
    )
    record = TokenizerRecord("tokenizer.model", tokenizer, 500, 2)
    publish_manifest(path, Manifest("megacl-data", 2, "web", "uint16", record, 0.25, (state,)), shards, [])
    return path


class Server:
    """moto's S3 server on a port that it keeps when it is started again; its objects outlive it."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._moto.start()
        self.port = self._moto.get_host_and_port()[1]

    def stop(self) -> None:
        self._moto.stop()

    def upload(self, path: Path, to: str) -> str:
        """Puts a folder at bucket/key; returns its URL."""
        store = fs.S3FileSystem(endpoint_override=f"http://127.0.0.1:{self.port}", allow_bucket_creation=True)
        store.create_dir(to.split("/")[0])
        for file in path.iterdir():
            if file.is_file():
                with store.open_output_stream(f"{to}/{file.name}") as opened:
                    opened.write(file.read_bytes())
        return f"s3://{to}?endpoint_override=http://127.0.0.1:{self.port}"

    def replace(self, key: str, content: bytes | None) -> None:
        store = fs.S3FileSystem(endpoint_override=f"http://127.0.0.1:{self.port}")
        if content is None:
            store.delete_file(key)
        else:
            with store.open_output_stream(key) as opened:
                opened.write(content)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def url(server: Server, folder: Path) -> str:
    return server.upload(folder, "bucket/web")


def cache_at(path: Path, *, shards: float = 100, patience: float = 20) -> ShardCache:
    """A cache for so many of the small shards."""
    return ShardCache(path / "cache", int(shards * 8800), patience)


def held(cache: ShardCache) -> list[Path]:
    return sorted(cache.path.glob("*.arrow"))


def all_of(source: Source) -> list[list[int]]:
    return [stream.read(0, stream.tokens).tolist() for stream in (source.train, source.validation)]


# ---------------------------------------------------------------------------------------------- reading


def test_a_source_on_a_store_reads_as_the_local_one(folder: Path, url: str, tmp_path: Path) -> None:
    local, remote = open_source(folder), open_source(url, cache=cache_at(tmp_path))
    assert held(cache_at(tmp_path)) == []
    assert (remote.fingerprint, remote.generation, remote.path) == (local.fingerprint, 1, url)
    assert all_of(remote) == all_of(local)
    starts = np.random.default_rng(1).integers(0, local.train.tokens - 99, 200)
    np.testing.assert_array_equal(remote.train.gather(starts, 99), local.train.gather(starts, 99))
    assert remote.train.documents_of(3).tokens(2).tolist() == local.train.documents_of(3).tokens(2).tolist()
    assert remote.tokenizer_file.read_bytes() == local.tokenizer_file.read_bytes()


def test_the_server_may_be_named_in_the_environment(
    server: Server, folder: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    assert all_of(open_source("s3://bucket/web", cache=cache_at(tmp_path))) == all_of(open_source(folder))


def test_what_pyarrow_opens_by_a_url_is_a_store_too(folder: Path, tmp_path: Path) -> None:
    assert all_of(open_source(f"file://{folder}", cache=cache_at(tmp_path))) == all_of(open_source(folder))


def test_a_source_on_a_store_travels_to_another_process(folder: Path, url: str, tmp_path: Path) -> None:
    remote = open_source(url, cache=cache_at(tmp_path))
    remote.train.read(0, 10)
    assert all_of(pickle.loads(pickle.dumps(remote))) == all_of(open_source(folder))


# ---------------------------------------------------------------------------------------------- the cache


def test_the_cache_keeps_its_bound_and_what_was_used_last(folder: Path, url: str, tmp_path: Path) -> None:
    cache = cache_at(tmp_path, shards=3)
    remote, local = open_source(url, cache=cache), open_source(folder)
    for shard in (0, 1, 2, 0, 5, 6):
        # As another process would: what this one has open is deleted last.
        script = "import sys, pickle; pickle.load(open(sys.argv[1], 'rb')).train.read(int(sys.argv[2]), 5)"
        (tmp_path / "source").write_bytes(pickle.dumps(remote))
        arguments = [str(tmp_path / "source"), str(shard * TOKENS)]
        subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, check=True)
        assert sum(file.stat().st_size for file in held(cache)) <= cache.size
    assert {file.stem for file in held(cache)} == {local.train.shards.row(shard).sha256 for shard in (0, 5, 6)}


def test_a_shard_that_was_deleted_is_read_to_its_end_and_fetched_again(folder: Path, url: str, tmp_path: Path) -> None:
    cache = cache_at(tmp_path, shards=1)
    one, other, local = open_source(url, cache=cache), open_source(url, cache=cache), open_source(folder)
    view = one.train.read(0, 100)
    for shard in (3, 0, 2):
        np.testing.assert_array_equal(other.train.read(shard * TOKENS, 50), local.train.read(shard * TOKENS, 50))
    assert len(held(cache)) == 1
    np.testing.assert_array_equal(view, local.train.read(0, 100))
    assert all_of(one) == all_of(local)


def test_the_files_of_a_cache_are_looked_at_only_where_it_may_be_full(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    look = ShardCache._delete_down_to
    monkeypatch.setattr(ShardCache, "_delete_down_to", lambda *arguments: looks.append(1) or look(*arguments))
    cache = cache_at(tmp_path, shards=5)
    remote = open_source(url, cache=cache)
    for shard in range(5):
        remote.train.read(shard * TOKENS, 1)
    assert len(looks) == 1  # nothing was counted yet
    remote.train.read(5 * TOKENS, 1)
    assert (len(looks), len(held(cache))) == (2, 5)
    for file in held(cache):
        file.unlink()
    (cache.path / ".used").write_text("torn")
    remote.train.read(6 * TOKENS, 1)
    assert (cache.path / ".used").read_text() == str(sum(file.stat().st_size for file in held(cache)))


def test_a_shard_that_no_cache_of_this_size_holds_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a shard of 8,\d+ bytes does not fit into a cache of 4,400; raise cache.size"):
        open_source(url, cache=cache_at(tmp_path, shards=0.5)).train.read(0, 1)


class Store(http.server.ThreadingHTTPServer):
    """The smallest S3: objects to read, which counts what is read and fails as it is told to."""

    def __init__(self, folder: Path) -> None:
        self.objects = {f"/bucket/web/{file.name}": file.read_bytes() for file in folder.iterdir()}
        self.status: int | None = None
        self.cut = 0  # answers that end too early
        self.read: list[str] = []
        super().__init__(("127.0.0.1", 0), _Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"s3://bucket/web?endpoint_override=http://127.0.0.1:{self.server_address[1]}"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Store

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        content = self.server.objects.get(self.path)
        status = self.server.status or (200 if content is not None else 404)
        if status != 200 or content is None:
            self.send_response(status)
            self.end_headers()
            return
        if (asked := self.headers.get("Range")) is not None:
            first, last = asked.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.server.read.append(self.path)
            cut = self.server.cut > 0 and self.path.endswith(".arrow")
            self.server.cut -= cut
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = self.close_connection or cut

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    found = Store(folder)
    yield found
    found.shutdown()
    found.server_close()


def test_several_processes_fetch_each_shard_once(folder: Path, store: Store, tmp_path: Path) -> None:
    remote = open_source(store.url, cache=cache_at(tmp_path))
    store.read.clear()
    (tmp_path / "source").write_bytes(pickle.dumps(remote))
    script = "import sys, pickle; s = pickle.load(open(sys.argv[1], 'rb')).train; print(int(s.read(0, s.tokens).sum()))"
    command = [sys.executable, "-c", script, str(tmp_path / "source")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    found = [int(process.communicate()[0]) for process in processes]
    assert found == [sum(all_of(open_source(folder))[0])] * 3
    assert sorted(store.read) == [f"/bucket/web/train-{index:05d}.arrow" for index in range(SHARDS)]


def test_a_full_disk_is_named_and_nothing_stays_behind(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_at(tmp_path)
    remote = open_source(url, cache=cache)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="cannot write a fetched shard: no space left on the device"):
        remote.train.read(0, 1)
    assert [file for file in cache.path.iterdir() if not file.name.startswith(".")] == []


# ---------------------------------------------------------------------------------------------- failures


def test_refused_keys_are_named_at_once(store: Store, tmp_path: Path) -> None:
    store.status = 403
    with pytest.raises(DataError, match=r"s3://bucket/web/manifest.json: the store refuses access .*AWS_ACCESS_KEY_ID"):
        open_source(store.url, cache=cache_at(tmp_path))
    store.status = None
    remote = open_source(store.url, cache=cache_at(tmp_path))
    store.status = 403
    with pytest.raises(DataError, match=r"train-00000.arrow: the store refuses access"):
        remote.train.read(0, 1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bucket/elsewhere", "s3://bucket/elsewhere: no manifest.json there. Upload a folder"),
        ("nowhere/web", "s3://nowhere/web: there is no bucket 'nowhere'"),
    ],
)
def test_a_missing_folder_and_a_missing_bucket_are_named(
    server: Server, url: str, tmp_path: Path, path: str, message: str
) -> None:
    with pytest.raises(DataError) as raised:
        open_source(url.replace("bucket/web", path), cache=cache_at(tmp_path))
    assert message in str(raised.value)


def test_a_missing_shard_and_a_changed_one_are_named(server: Server, folder: Path, tmp_path: Path) -> None:
    url = server.upload(folder, "bucket/damaged")
    content = (folder / "train-00001.arrow").read_bytes()
    server.replace("bucket/damaged/train-00000.arrow", None)
    server.replace("bucket/damaged/train-00001.arrow", content[:-1])
    server.replace("bucket/damaged/train-00002.arrow", content[:-1] + bytes([content[-1] ^ 1]))
    remote = open_source(url, cache=cache_at(tmp_path))
    for shard, message in enumerate(["the shard is missing", "but shards.arrow says", "its hash is not the one"]):
        with pytest.raises(DataError, match=f"s3://bucket/damaged/train-0000{shard}.arrow: .*{message}"):
            remote.train.read(shard * TOKENS, 1)
    assert held(remote.train.folder.cache) == []  # type: ignore[union-attr]


def test_what_fails_for_a_while_is_tried_again(folder: Path, store: Store, tmp_path: Path) -> None:
    remote = open_source(store.url, cache=cache_at(tmp_path))
    store.cut = 2
    assert remote.train.read(0, 10).tolist() == open_source(folder).train.read(0, 10).tolist()
    store.status = 503
    threading.Timer(0.5, lambda: setattr(store, "status", None)).start()
    assert remote.train.read(TOKENS, 10).tolist() == open_source(folder).train.read(TOKENS, 10).tolist()


def test_a_server_that_stays_away_ends_in_one_line_after_the_stated_time(store: Store, tmp_path: Path) -> None:
    remote = open_source(store.url, cache=cache_at(tmp_path, patience=0.5))
    store.shutdown()
    store.server_close()
    began = time.monotonic()
    said = r"train-00000.arrow: the store cannot be read from \S+, tried for 0.5 s .*same command"
    with pytest.raises(UnreachableError, match=said):
        remote.train.read(0, 1)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://key:secret@bucket/web", r"s3://\.\.\.@bucket/web: a path must not hold keys"),
        ("s3://bucket/web?endpoint=x", r"pyarrow cannot open it as a folder \(unknown settings endpoint\)"),
        ("nothing://bucket/web", "pyarrow cannot open it as a folder"),
    ],
)
def test_a_url_that_is_none_is_named(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(path, cache=cache_at(tmp_path))


def test_without_a_cache_a_url_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no cache to fetch them into"):
        open_source("s3://bucket/web")
    tree = prepared.tree(tmp_path / "run", sources={"english": {"path": "s3://bucket/web"}})
    with pytest.raises(ConfigError, match=r"sources.english.path is 's3://bucket/web', a store, .* set cache.path"):
        from_tree(tree)
    tree["cache"] = {"path": "cache", "size": "100 gigabytes"}
    with pytest.raises(ConfigError, match=r"cache.size is '100 gigabytes'; it must be a number of bytes, such as"):
        from_tree(tree)


# ---------------------------------------------------------------------------------------------- training


def stream_of(source: Source) -> PhaseStream:
    return begin(Lineage(), phase_config("p", {"web": 1}, 60), {"web": source}, seq_length=99, batch=8)


def batches_of(stream: PhaseStream) -> list[Any]:
    return [batch.tokens.tolist() for batch in Loader(stream, batch_size=8, rank=0, world_size=1, vocab_size=500)]


def windowed(source: Source) -> Source:
    import dataclasses

    return dataclasses.replace(source, window=2)


def test_a_server_that_dies_in_an_epoch_and_comes_back_changes_nothing(
    server: Server, folder: Path, url: str, tmp_path: Path
) -> None:
    local = batches_of(stream_of(windowed(open_source(folder))))
    stream = stream_of(windowed(open_source(url, cache=cache_at(tmp_path, shards=8))))
    found = []
    for batch in Loader(stream, batch_size=8, rank=0, world_size=1, vocab_size=500):
        if not found:
            server.stop()
            threading.Timer(0.5, server.start).start()
        found.append(batch.tokens.tolist())
    assert found == local


def test_shards_are_fetched_before_they_are_read(url: str, tmp_path: Path) -> None:
    source = windowed(open_source(url, cache=cache_at(tmp_path, shards=20)))
    loader = Loader(stream_of(source), batch_size=8, rank=0, world_size=1, vocab_size=500)
    batches = iter(loader)
    next(batches)
    end = time.monotonic() + 20
    while len(held(source.folder.cache)) < 5 and time.monotonic() < end:  # type: ignore[union-attr]
        time.sleep(0.01)
    assert 5 <= len(held(source.folder.cache)) <= 8  # type: ignore[union-attr]
    assert loader.arrived > 0
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("megacl")]


def test_training_from_a_store_is_training_from_the_folder(
    server: Server, prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = prepared.tree(tmp_path / "local")
    remote = prepared.tree(tmp_path / "remote", cache={"path": str(tmp_path / "cache"), "size": "0.2 MB"})
    for name, path in prepared.sources.items():
        local["sources"][name]["window"] = 1
        remote["sources"][name] = {"path": server.upload(path, f"bucket/{name}"), "window": 1}
    for tree in (local, remote):
        assert train(from_tree(tree)) == "done"
    records = [load_lineage(tmp_path / name) for name in ("local", "remote")]
    assert records[0].sources.keys() == records[1].sources.keys()
    weights = [(tmp_path / name / "checkpoints/step-00000020" / WEIGHTS) for name in ("local", "remote")]
    assert sha256_of(weights[0]) == sha256_of(weights[1])
    cache = ShardCache(tmp_path / "cache", 10**6)
    found, problems = sources_of(records[1], {}, cache=cache)
    assert (sorted(found), problems) == (["english", "german"], [])
    (named,) = open_named([remote["sources"]["german"]["path"]], load_tokenizer(prepared.tokenizer), cache).values()
    assert named.fingerprint == found["german"].fingerprint
    del remote["sources"]["german"]["window"]
    remote |= {"run_dir": str(tmp_path / "other"), "cache": {"path": str(tmp_path / "cache"), "size": "0.01 MB"}}
    assert "each is fetched again and again. Set sources.german.window" in "\n".join(plan_text(from_tree(remote)))


def tree_whose_server_dies(
    server: Server, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, patience: float
) -> dict[str, Any]:
    """A configuration of a long run, after whose third step the store is gone, and the cache empty."""
    from megacl import trainer

    original = trainer._Run._step

    def step(self: Any, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **more)
        if self.step == 3:
            server.stop()
            for file in (tmp_path / "cache").glob("*.arrow"):
                file.unlink()
            _open_fetched.cache_clear()

    monkeypatch.setattr(trainer._Run, "_step", step)
    cache = {"path": str(tmp_path / "cache"), "size": "0.2 MB", "patience": patience}
    tree = prepared.tree(tmp_path / "run", cache=cache, evaluation={}, checkpoint={})
    for name, path in prepared.sources.items():
        tree["sources"][name] = {"path": server.upload(path, f"bucket/dying-{name}"), "window": 1}
    tree["phases"][0]["steps"] = 5000
    return tree


def steps_made_and_saved(run_dir: Path) -> tuple[int, int]:
    made = (run_dir / "metrics.jsonl").read_text().count('"kind": "step"')
    return made, open_checkpoint(find_checkpoint(str(run_dir), pytest.fail)).state.step


def test_a_run_that_waits_for_a_dead_store_hears_a_signal_and_saves(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_whose_server_dies(Server(), prepared, tmp_path, monkeypatch, patience=60)
    threading.Timer(4, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    assert train(from_tree(tree)) == "stopped"
    made, saved = steps_made_and_saved(tmp_path / "run")
    assert made == saved >= 3


def test_a_run_whose_store_stays_away_saves_its_last_step_before_it_ends(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tree_whose_server_dies(Server(), prepared, tmp_path, monkeypatch, patience=0.5)
    with pytest.raises(UnreachableError, match=r"reading source 'english'.*the store cannot be read"):
        train(from_tree(tree))
    made, saved = steps_made_and_saved(tmp_path / "run")
    assert made == saved >= 3
    left = read_outcome(tmp_path / "run")
    assert left is not None
    assert (left.outcome, left.exit_status, left.step, left.node) == ("unreachable", 1, saved, None)

    # What it has read is neither lost nor nothing to evaluate on; it cannot be reached now.
    lineage = load_lineage(tmp_path / "run")
    with pytest.raises(
        UnreachableError, match=r"the model's history reads source 'english', fingerprint .*cannot be read"
    ):
        sources_of(lineage, {}, cache=cache_at(tmp_path, patience=0.2))
    found, problems = sources_of(lineage, {}, cache=cache_at(tmp_path, patience=0.2), pass_over_unreachable=True)
    assert (found, len(problems)) == ({}, 1)
    status, out, _ = command_line(capsys, "lineage", str(tmp_path / "run"), "--verify")
    assert status == 0
    assert re.search(r"unchecked +.*source 'english', fingerprint .*cannot be read", out)


def test_a_run_that_cannot_reach_its_store_hears_a_signal_before_it_begins(
    store: Store, prepared: Prepared, tmp_path: Path
) -> None:
    store.status = 503
    cache = {"path": str(tmp_path / "cache"), "size": "0.2 MB", "patience": 60}
    tree = prepared.tree(tmp_path / "run", cache=cache)
    for name in prepared.sources:
        tree["sources"][name] = {"path": store.url}
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    assert train(from_tree(tree)) == "stopped"


def test_the_dry_run_says_what_a_store_makes_costly(server: Server, prepared: Prepared, tmp_path: Path) -> None:
    cache = {"path": str(tmp_path / "cache"), "size": "0.005 MB"}
    tree = prepared.tree(tmp_path / "run", cache=cache)
    for name, path in prepared.sources.items():
        tree["sources"][name] = {"path": server.upload(path, f"bucket/dear-{name}"), "window": 1}
    again = (
        r"replays source 'english' of phase 'english' from a store in a permutation .* set replay.policy to original"
    )
    assert not re.search(again, "\n".join(plan_text(from_tree(tree))))
    tree["phases"][1]["replay"]["policy"] = "uniform"
    assert re.search(again, "\n".join(plan_text(from_tree(tree))))
    first = "packing counts the rows of all its shards before the first step, so each machine fetches all"
    assert first not in "\n".join(plan_text(from_tree(tree)))
    tree |= {"packing": "best_fit", "boundaries": "attention", "cache": cache | {"size": "1 MB"}}
    assert f"source 'german': {first}" in "\n".join(plan_text(from_tree(tree)))


# ---------------------------------------------------------------------------------------------- staging


def staging(path: Path | str, **settings: Any) -> ShardCache:
    return ShardCache(path, 10**9, patience=0.2, stage=True, **settings)


def test_a_folder_that_is_staged_is_read_from_the_cache_and_keeps_its_name(folder: Path, tmp_path: Path) -> None:
    cache = staging(tmp_path / "cache")
    staged, plain = open_source(folder, cache=cache), open_source(folder)
    assert not held(cache)  # nothing is copied before it is read
    assert (staged.path, staged.fingerprint, staged.tokenizer_file) == (
        plain.path,
        plain.fingerprint,
        plain.tokenizer_file,
    )
    staged.train.read(0, 1)
    assert len(held(cache)) == 1
    assert all_of(staged) == all_of(plain)
    copies = {file.read_bytes() for file in held(cache)}
    assert copies <= {file.read_bytes() for file in folder.rglob("*.arrow")}
    travelled = pickle.loads(pickle.dumps(staged))
    assert all_of(travelled) == all_of(plain)


def test_a_file_system_that_does_not_answer_is_waited_for_where_folders_are_staged(
    folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = copy / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    manifest.symlink_to(manifest)  # an error that is neither "missing" nor "refused"
    with pytest.raises(
        UnreachableError, match=r"manifest.json: the file system cannot be read from \S+, tried for 0.2 s"
    ):
        open_source(copy, cache=staging(tmp_path / "cache"))
    patient = ShardCache(tmp_path / "cache", 10**9, patience=30, stage=True)

    (tmp_path / "mended").write_bytes(content)
    threading.Timer(0.3, os.replace, (tmp_path / "mended", manifest)).start()
    assert open_source(copy, cache=patient).fingerprint == open_source(folder).fingerprint


@pytest.mark.parametrize(
    ("file", "message"), [("manifest.json", "no manifest.json there"), ("shards.arrow", "shards.arrow: .* is missing")]
)
def test_a_file_that_is_missing_where_folders_are_staged_is_not_waited_for(
    folder: Path, tmp_path: Path, file: str, message: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / file).unlink()
    with pytest.raises(DataError, match=message):
        open_source(copy, cache=ShardCache(tmp_path / "cache", 10**9, patience=1000, stage=True))
    with pytest.raises(DataError, match=r"no manifest.json there"):  # nor what is no folder at all
        open_source(folder / "manifest.json", cache=ShardCache(tmp_path / "cache", 10**9, patience=1000, stage=True))


def test_shards_of_a_folder_that_has_become_a_file_are_missing(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    source = open_source(copy, cache=ShardCache(tmp_path / "cache", 10**9, patience=1000, stage=True))
    shutil.rmtree(copy)
    copy.write_text("")
    with pytest.raises(DataError, match=r"the shard is missing. Restore it from a copy"):
        source.train.read(0, 1)


def test_a_shard_that_was_changed_or_is_gone_is_not_staged(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    source = open_source(copy, cache=staging(tmp_path / "cache"))
    first = copy / source.train.shards.row(0).path
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    with pytest.raises(DataError, match=r"its hash is not the one in shards.arrow; it was changed. Restore it"):
        source.train.read(0, 1)
    first.unlink()
    with pytest.raises(DataError, match=r"the shard is missing. Restore it from a copy"):
        source.train.read(0, 1)
    assert not held(source.folder.cache)  # type: ignore[union-attr]


def test_a_cache_lies_where_the_environment_of_each_machine_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SCRATCH_OF_JOB", raising=False)
    cache = staging("$SCRATCH_OF_JOB/shards")
    source = open_source(folder, cache=cache)
    with pytest.raises(ConfigError, match=r"cache.path is '\$SCRATCH_OF_JOB/shards', and \$SCRATCH_OF_JOB is not set"):
        source.train.read(0, 1)
    monkeypatch.setenv("SCRATCH_OF_JOB", str(tmp_path))
    pickle.loads(pickle.dumps(source)).train.read(0, 1)
    assert len(list((tmp_path / "shards").glob("*.arrow"))) == 1


def test_a_run_on_staged_folders_is_the_run_on_the_folders(prepared: Prepared, tmp_path: Path) -> None:
    cache = {"path": str(tmp_path / "scratch"), "size": "1 GB", "stage": True}
    for name, more in (("plain", {}), ("staged", {"cache": cache})):
        tree = prepared.tree(tmp_path / name, **more)
        tree["phases"] = [tree["phases"][0] | {"steps": 4}]
        assert train(from_tree(tree)) == "done"
    assert losses(tmp_path / "staged") == losses(tmp_path / "plain")
    mine, its = (load_lineage(tmp_path / name).phases[0] for name in ("staged", "plain"))
    assert (mine.sources, mine.samples) == (its.sources, its.samples)
    english = {sha256_of(file) for file in prepared.sources["english"].rglob("*.arrow")}
    german = {sha256_of(file) for file in prepared.sources["german"].rglob("*.arrow")}
    copied = {file.stem for file in (tmp_path / "scratch").glob("*.arrow")}
    train_shards = {
        sha256_of(prepared.sources["german"] / row.path) for row in open_source(prepared.sources["german"]).train.shards
    }
    assert copied & english
    assert not copied & train_shards & german  # which only a phase to come would read
