"""A campaign of faults against megacl's commands: kills, full disks, damaged files, two processes at once.

    world = World(folder)
    verdicts = [play(world, "kill-save", seed=0, number=number) for number in range(5)]
    print("\\n".join(table(verdicts)))

world.py: what all rounds share. rounds.py: one round, its processes and what was found wrong. checks.py: what must hold
after a fault. kills.py, disks.py, damage.py: the kinds of faults. campaign.py: many rounds, and their table.
tools/faults.py runs them.
"""
