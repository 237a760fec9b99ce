"""Writes a data folder's documents with the tokens of each in random order: replay that must not help.

python tools/shuffle_tokens.py DATA --out PREFIX [--seed N]
megacl prepare PREFIX.bin --tokenizer FILE --out SHUFFLED --validation 0

DATA: a folder that `megacl prepare` wrote. PREFIX.bin and PREFIX.idx are a Megatron dataset of its training documents,
whose tokens are as frequent as before, in each document, and say nothing about one another. A study replays them as
the control of a replay share: what helps there is practice in which tokens occur, not in the text.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megacl.data.megatron import Ids, write_megatron
from megacl.data.source import TokenStream, open_source
from megacl.errors import MegaclError


def shuffled(stream: TokenStream, seed: int) -> Iterator[Ids]:
    """The documents in the stream's order, the EOS of each still at its end."""
    random = np.random.default_rng(seed)
    for shard in range(len(stream.shards)):
        documents = stream.documents_of(shard)
        for index in range(len(documents)):
            tokens = documents.tokens(index)
            yield np.concatenate([random.permutation(tokens[:-1]), tokens[-1:]])


def main() -> int:
    """Returns the exit status: 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(description="Shuffle the tokens of each document of a data folder.")
    parser.add_argument("data", type=Path, metavar="DATA", help="a folder that megacl prepare wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="PREFIX", help="PREFIX.bin and PREFIX.idx")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        source = open_source(arguments.data)
        documents = write_megatron(arguments.out, shuffled(source.train, arguments.seed), np.int32)
    except MegaclError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}.bin: {documents:,} documents, {source.train.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
