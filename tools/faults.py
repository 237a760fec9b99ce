"""A campaign of faults against megacl's commands, and a table of what did not hold.

    python tools/faults.py --rounds 200 [--seed 0] [--only KIND] [--json OUT] [--folder FOLDER]

Each round draws a moment for one kind of fault, runs the real commands on a tiny model, and looks at what is left: see
docs/reliability.md. It ends with status 1 where anything did not hold; the folders of such rounds stay. Full and
read-only disks are mounts, which only root may make; without, these kinds are left out. The same seed draws the same
rounds, but which instruction a process is at when the fault comes is the machine's doing.
"""

import argparse
import contextlib
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

from faultsim.campaign import KINDS, MOUNTS, Verdict, campaign, table
from faultsim.disks import why_no_mounts
from faultsim.world import World


def main() -> int:
    """Returns the exit status: 0, 1 where something did not hold, or 2 where nothing was played."""
    parser = argparse.ArgumentParser(description="Disturb megacl's commands, and see that nothing is lost.")
    parser.add_argument("--rounds", type=int, default=len(KINDS), metavar="N", help="by default one of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*KINDS], metavar="KIND", help=f"one kind: {', '.join(KINDS)}")
    parser.add_argument("--json", type=Path, metavar="OUT", help="a file for what came of each round")
    parser.add_argument(
        "--folder", type=Path, help="where the rounds are played; by default the system's temporary one"
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="megacl-faults-", dir=arguments.folder))
    kinds = [arguments.only] if arguments.only else [*KINDS]
    if {*kinds} & {*MOUNTS} and (why := why_no_mounts(folder)):
        print(f"not played: {', '.join(MOUNTS)}: {why}")
        kinds = [kind for kind in kinds if kind not in MOUNTS]
    verdicts: list[Verdict] = []
    with contextlib.suppress(KeyboardInterrupt):  # the table says what was played until then
        for verdict in campaign(World(folder), kinds, rounds=arguments.rounds, seed=arguments.seed):
            verdicts.append(verdict)
            print(f"{len(verdicts)}/{arguments.rounds}  {verdict.kind} {verdict.number}: {verdict.moment}", flush=True)
            for column, problem in verdict.problems:
                print(f"    {column}: {problem}", flush=True)
    print("\n".join(table(verdicts)))
    if arguments.json:
        rounds = [dataclasses.asdict(verdict) for verdict in verdicts]
        arguments.json.write_text(json.dumps({"seed": arguments.seed, "rounds": rounds}, indent=1) + "\n")
    if any(verdict.problems for verdict in verdicts):
        print(f"the rounds in which something did not hold are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0 if verdicts else 2


if __name__ == "__main__":
    sys.exit(main())
