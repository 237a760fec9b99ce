"""Extends a tokenizer, or records that one extends another, so that data which the smaller one prepared stays valid.

python tools/extend_tokenizer.py BASE EXTENDED --documents german/ --pieces 4000    # makes EXTENDED
python tools/extend_tokenizer.py BASE EXTENDED                                      # EXTENDED is there

The first appends to a BPE tokenizer (SentencePiece's, or a tokenizer.json) the pieces that are the most frequent in the
documents and that it has not. Both check that every id of BASE means the same piece in EXTENDED, and write
EXTENDED.extends.json beside it.
"""

import argparse
import sys
from pathlib import Path

from megacl.data.tokenizer import record_extension
from megacl.data.tokenizer_training import extend_tokenizer
from megacl.errors import MegaclError


def main() -> int:
    """Returns the exit status: 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(description="Extend a tokenizer, or record that one extends another.")
    parser.add_argument("base", metavar="BASE", help="the tokenizer that data was prepared with")
    parser.add_argument("extended", metavar="EXTENDED", help="the tokenizer that has more pieces behind its own")
    parser.add_argument(
        "--documents", nargs="+", metavar="INPUT", help="make EXTENDED of these: files, folders or patterns"
    )
    parser.add_argument("--pieces", type=int, metavar="N", help="with --documents: how many pieces to add")
    parser.add_argument("--field", default="text", help="the key or column that holds the text (default: text)")
    arguments = parser.parse_args()
    if (arguments.documents is None) != (arguments.pieces is None):
        parser.error("--documents and --pieces go together")
    try:
        if arguments.documents is None:
            tokenizer = record_extension(arguments.base, arguments.extended)
        else:
            base, extended = Path(arguments.base), Path(arguments.extended)
            tokenizer = extend_tokenizer(base, arguments.documents, extended, arguments.pieces, arguments.field)
    except MegaclError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{tokenizer.file}: {tokenizer.vocab_size} pieces, extends {', '.join(tokenizer.extends)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
