"""Trains a SentencePiece tokenizer on raw documents.

python tools/train_tokenizer.py INPUT... --out FILE.model --vocab-size N [--model-type bpe|unigram]

INPUT: files of documents, folders of them, or patterns, as for megacl prepare. The same inputs give the same file.
"""

import argparse
import sys
from pathlib import Path

from megacl.data.tokenizer_training import train_tokenizer
from megacl.errors import MegaclError


def main() -> int:
    """Returns the exit status: 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(description="Train a SentencePiece tokenizer on raw documents.")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="a file of documents, a folder of them, or a pattern"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.model")
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N", help="pieces, control and bytes included")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument("--field", default="text", help="the key or column that holds the text (default: text)")
    arguments = parser.parse_args()
    try:
        tokenizer = train_tokenizer(
            arguments.inputs, arguments.out, arguments.vocab_size, arguments.model_type, arguments.field
        )
    except MegaclError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{tokenizer.file}: {tokenizer.vocab_size} pieces, fingerprint {tokenizer.fingerprint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
