"""The demo: English, then German with and without replay, then one table and one page. `make demo` runs it.

It runs the commands that a user would type, shows each, and reads what they left in the run directories.
"""

import subprocess
import sys
import time
from pathlib import Path

from megacl.heldout import loss_at, read_evaluations
from megacl.log import table_text

REPLAY, NO_REPLAY, PAGE = Path("demo/replay-25"), Path("demo/replay-0"), Path("demo/report.html")


def megacl(*arguments: str) -> None:
    """Runs one command of megacl, shown as it would be typed."""
    print("\n$ megacl", *arguments, flush=True)
    status = subprocess.run([sys.executable, "-m", "megacl", *arguments], check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    begun = time.monotonic()
    megacl("train", "recipe/demo.yaml")
    megacl("train", "recipe/demo.yaml", "recipe/demo-no-replay.yaml")
    megacl("lineage", str(REPLAY))
    megacl("sample", str(REPLAY), "--prompt", "Die Datei", "--tokens", "40")
    megacl("report", str(REPLAY), str(NO_REPLAY), "--out", str(PAGE))

    replay, no_replay = read_evaluations(REPLAY), read_evaluations(NO_REPLAY)
    print("\nheld-out loss in nats a token: English first, then German")
    header = ["", "before German", "after, no replay", "after, 25 % replay"]
    columns = [(replay, "english"), (no_replay, "german"), (replay, "german")]
    rows = [
        [source, *(f"{loss_at(way, source, phase):.3f}" for way, phase in columns)] for source in ("english", "german")
    ]
    print("\n".join(table_text(header, rows)))
    print(f"\n{time.monotonic() - begun:.0f} s; the report is {PAGE}")


if __name__ == "__main__":
    main()
