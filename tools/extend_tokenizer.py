"""Records that one tokenizer extends another, so that data which the smaller one prepared stays valid.

python tools/extend_tokenizer.py BASE EXTENDED

Checks first that every id of BASE means the same piece in EXTENDED; writes EXTENDED.extends.json beside it.
"""

import argparse
import sys

from megacl.data.tokenizer import record_extension
from megacl.errors import MegaclError


def main() -> int:
    """Returns the exit status: 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(description="Record that one tokenizer extends another.")
    parser.add_argument("base", metavar="BASE", help="the tokenizer that data was prepared with")
    parser.add_argument("extended", metavar="EXTENDED", help="the tokenizer that has more pieces behind its own")
    arguments = parser.parse_args()
    try:
        tokenizer = record_extension(arguments.base, arguments.extended)
    except MegaclError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{tokenizer.file} extends {', '.join(tokenizer.extends)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
