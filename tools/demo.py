"""The demo: English, then German with and without replay, then one table and one page. `make demo` runs it.

It runs the commands that a user would type, shows each, and reads what they left in the run directories.
"""

import subprocess
import sys
import time
from pathlib import Path

from megacl.evaluate import forgetting_table
from megacl.log import read_metrics, table_text

REPLAY, NO_REPLAY, PAGE = Path("demo/replay-25"), Path("demo/replay-0"), Path("demo/report.html")


def megacl(*arguments: str) -> None:
    """Runs one command of megacl, shown as it would be typed."""
    print("\n$ megacl", *arguments, flush=True)
    status = subprocess.run([sys.executable, "-m", "megacl", *arguments], check=False).returncode
    if status:
        sys.exit(status)


def ends(run: Path) -> dict[str, dict[str, float]]:
    """source -> label -> held-out loss, where the run began ("before") and at each phase's end."""
    evaluations = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "evaluation"]
    return {row.source: dict(row.losses) for row in forgetting_table(evaluations)}


def main() -> None:
    begun = time.monotonic()
    megacl("train", "recipe/demo.yaml")
    megacl("train", "recipe/demo.yaml", "recipe/demo-no-replay.yaml")
    megacl("lineage", str(REPLAY))
    megacl("sample", str(REPLAY), "--prompt", "Die Datei", "--tokens", "40")
    megacl("report", str(REPLAY), str(NO_REPLAY), "--out", str(PAGE))

    replay, no_replay = ends(REPLAY), ends(NO_REPLAY)
    print("\nheld-out loss in nats a token: English first, then German")
    header = ["", "before German", "after, no replay", "after, 25 % replay"]
    rows = [
        [
            source,
            *(f"{loss:.3f}" for loss in (replay[source]["english"], no_replay[source]["german"], losses["german"])),
        ]
        for source, losses in replay.items()
    ]
    print("\n".join(table_text(header, rows)))
    print(f"\n{time.monotonic() - begun:.0f} s; the report is {PAGE}")


if __name__ == "__main__":
    main()
