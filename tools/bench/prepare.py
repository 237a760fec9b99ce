"""How fast raw text becomes tokens on disk: megacl, the tokenizer alone, and the peers, side by side in one run.

    bash tools/bench/make_peers.sh /tmp/peers
    python tools/bench/prepare.py --input corpus.jsonl --peers /tmp/peers --repeats 3 --grow 0.1 1

MB of JSONL a second, the median of the repeats and their span; all take turns, each in a process of its own that does
not count its imports. `alone` is the tokenizer on texts in memory, with lists of ids as all that is made: on one
thread, and on as many as there are cores. megacl and the peers read the file and write all they write.

Without --tokenizer: the peers' SentencePiece model, and a byte-level BPE and a SentencePiece unigram model of 32,000
tokens each, trained on the first 20 MB. megacl encodes the first two by units, the third as whole texts. --grow: megacl
on parts of the input, with the memory of its largest process. Repeated text would flatter megacl, which remembers: give
real documents.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORES = len(os.sched_getaffinity(0))
PEERS = ("megatron", "datasets", "litdata", "mds")
TEXTS = 1000
"""Documents that the tokenizer alone is given at once."""


def alone(threads: int, file: str, tokenizer: str) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    import sentencepiece
    import tokenizers

    with open(file) as lines:
        texts = [json.loads(line)["text"] for line in lines]
    groups = [texts[start : start + TEXTS] for start in range(0, len(texts), TEXTS)]
    begun = time.perf_counter()
    if tokenizer.endswith(".json"):
        model = tokenizers.Tokenizer.from_file(tokenizer)
        for group in groups:
            for encoding in model.encode_batch_fast(group, add_special_tokens=False):
                encoding.ids  # noqa: B018 - reading it makes the list
    else:
        model = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
        for group in groups:
            model.encode(group, num_threads=threads)
    print(time.perf_counter() - begun)


def megacl(file: str, tokenizer: str, out: str) -> None:
    import resource

    from megacl.data.prepare import prepare
    from megacl.data.tokenizer import load_tokenizer

    begun = time.perf_counter()
    prepare([file], tokenizer=load_tokenizer(tokenizer), out=out, validation=0)
    seconds = time.perf_counter() - begun
    # Not this process's own ru_maxrss, which begins with the peak of the process that started it.
    status = Path("/proc/self/status").read_text()
    own = int(status.split("VmHWM:")[1].split()[0])
    print(seconds, 1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))


def measure(name: str, file: Path, tokenizer: Path, work: Path, peers: Path | None) -> tuple[float, int]:
    """Seconds, and the bytes of memory of megacl's largest process."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    if name in PEERS:
        command = [str(peers / "bin/python"), str(ROOT / "tools/bench/peers/prepare.py")] if peers else []
        command += [name, str(file), str(tokenizer), str(out)]
    else:
        command = [sys.executable, __file__, "--one", name, str(file), str(tokenizer), str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    if done.returncode:
        sys.exit(f"{name} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    seconds, *memory = done.stdout.split("\n")[-2].split()
    return float(seconds), int(memory[0]) if memory else 0


def train_byte_level(file: Path, out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    with open(file) as lines:
        texts = [json.loads(line)["text"] for line in lines]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_000 - 1, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, trainer)
    model.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    model.save(str(out))


def train_unigram(file: Path, out: Path) -> None:
    from megacl.data.tokenizer_training import train_tokenizer

    train_tokenizer([str(file)], out, 32_000, "unigram")


def compare(arguments: argparse.Namespace, tokenizer: Path, work: Path) -> None:
    peers = PEERS if arguments.peers else ()
    names = ("alone, 1", f"alone, {CORES}", "megacl", *peers)
    size = arguments.input.stat().st_size / 1e6
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in names:
            speeds[name].append(size / measure(name, arguments.input, tokenizer, work, arguments.peers)[0])
    middle = {name: statistics.median(found) for name, found in speeds.items()}
    print(f"\n{tokenizer.name}, {size:.1f} MB of JSONL, {CORES} cores, {arguments.repeats} repeats")
    print(f"{'':12}{'MB/s':>8}{'span':>14}{'to alone':>10}{'to megatron':>13}")
    for name, found in speeds.items():
        span = f"{min(found):.1f}-{max(found):.1f}"
        to_megatron = f"{middle[name] / middle['megatron']:13.2f}" if peers else ""
        print(f"{name:12}{middle[name]:8.1f}{span:>14}{middle[name] / middle[names[1]]:10.2f}{to_megatron}")
    for part in arguments.grow:
        file = work / "part.jsonl"
        with open(arguments.input, "rb") as lines:
            file.write_bytes(b"".join(lines.readlines(int(part * arguments.input.stat().st_size))))
        seconds, memory = measure("megacl", file, tokenizer, work, None)
        size = file.stat().st_size / 1e6
        print(f"megacl, {size:.1f} MB: {size / seconds:.1f} MB/s, {memory / 1e6:.0f} MB of memory")


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        name, file, tokenizer, out = sys.argv[2:]
        megacl(file, tokenizer, out) if name == "megacl" else alone(int(name.split()[1]), file, tokenizer)
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", type=Path, required=True, metavar="JSONL", help="documents, each with a field text")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="what make_peers.sh made")
    parser.add_argument(
        "--tokenizer", type=Path, action="append", metavar="FILE", help=".model or .json; may be repeated"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--grow", type=float, nargs="*", default=[], metavar="PART")
    arguments = parser.parse_args()
    if not arguments.peers:
        print("the peers are left out: make them with tools/bench/make_peers.sh DIR and give --peers DIR")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if not arguments.tokenizer:
            sample = work / "sample.jsonl"
            with open(arguments.input, "rb") as lines:
                sample.write_bytes(b"".join(lines.readlines(20_000_000)))
            train_byte_level(sample, work / "byte-level.json")
            train_unigram(sample, work / "unigram.model")
            model = [arguments.peers / "mistral.model"] if arguments.peers else []
            arguments.tokenizer = [*model, work / "byte-level.json", work / "unigram.model"]
        for tokenizer in arguments.tokenizer:
            compare(arguments, tokenizer, work)


if __name__ == "__main__":
    main()
