"""Commands that are killed, told to stop, or started twice."""

import os
import shutil
import signal
import time

from faultsim.checks import contents_of, left_over, published, steps_recorded
from faultsim.rounds import FAILED, HALF, LOST, UNLIKE, Process, Round
from faultsim.world import ENDS, KEPT, SAVES, STEPS, staging_of
from megacl.checkpoint import list_checkpoints, step_of

_SAVE_SECONDS = 0.04
"""About what a save takes here, its pruning included."""


def kill_train(turn: Round) -> None:
    """SIGKILL at a random moment of a run: now and then before its first step, else behind a drawn one."""
    process = turn.train()
    if turn.draw.random() < 0.15:
        seconds = turn.draw.uniform(0.0, turn.world.start_up)
        turn.moment = f"SIGKILL {seconds:.2f} s after its start"
        time.sleep(seconds)
    else:
        step, seconds = turn.draw.randint(1, STEPS), turn.draw.uniform(0.0, 0.03)
        turn.moment = f"SIGKILL {1e3 * seconds:.1f} ms after the record of step {step}"
        turn.wait(process, lambda: steps_recorded(turn.run_dir) >= step)
        time.sleep(seconds)
    _kill_run(turn, process)


def kill_save(turn: Round) -> None:
    """SIGKILL while a run saves: a drawn time after the first trace of a drawn checkpoint, or after its name is there.

    On a busy machine the time is too short for the whole of a save; what comes behind it must be met too.
    """
    process, step, there = turn.train(), turn.draw.choice(SAVES), turn.draw.random() < 0.5
    seconds = turn.draw.uniform(0.0, _SAVE_SECONDS)
    event = f"checkpoint of step {step} was there" if there else f"save of step {step} began"
    turn.moment = f"SIGKILL {1e3 * seconds:.1f} ms after the {event}"
    _wait_for_save(turn, process, step, there=there)
    time.sleep(seconds)
    _kill_run(turn, process)


def stop_save(turn: Round) -> None:
    """SIGTERM or SIGUSR1 while a run saves: it finishes that first, saves its last step too, and ends with 75."""
    process, step = turn.train(), turn.draw.choice(SAVES[:-1])
    number = turn.draw.choice([signal.SIGTERM, signal.SIGUSR1])
    seconds = turn.draw.uniform(0.0, _SAVE_SECONDS / 4)
    turn.moment = f"{number.name} {1e3 * seconds:.1f} ms after the save of step {step} began"
    _wait_for_save(turn, process, step)
    time.sleep(seconds)
    turn.in_the_midst = bool(left_over(turn.run_dir / "checkpoints"))
    process.popen.send_signal(number)
    status, _ = turn.ended(process, 75, 0)
    reached, saved = steps_recorded(turn.run_dir), published(turn.run_dir)
    if status == 0 and reached < STEPS:
        turn.note(FAILED, f"it ended with status 0 at step {reached}")
    if max(saved, default=0) != reached:
        turn.note(LOST, f"it stopped behind step {reached}, and its newest checkpoint is {max(saved, default=0)}")
    if step not in saved and not sum(later > step for later in saved) >= KEPT:
        turn.note(LOST, f"the save of step {step} was under way, and is not published; there are {[*saved]}")
    turn.note(FAILED, *left_over(turn.run_dir / "checkpoints"))
    turn.check_loss({*saved})
    turn.go_on()


def kill_convert(turn: Round) -> None:
    """SIGKILL of a conversion: now and then before it writes, else while it has a drawn number of its files."""
    to = turn.draw.choice(["hf", "megacl"])
    _, whole, to_begin = turn.world.converted(to)
    destination = turn.folder / "model"
    files = staging_of(destination) / "files"
    process = turn.start(*turn.world.convert_arguments(to))
    if turn.draw.random() < 0.15:
        seconds = turn.draw.uniform(0.0, to_begin)
        turn.moment = f"SIGKILL {seconds:.2f} s after its start, to {to}"
    else:
        count = turn.draw.randint(0, sum(name.endswith(".safetensors") for name in whole))
        seconds = turn.draw.uniform(0.0, _SAVE_SECONDS)
        turn.moment = f"SIGKILL {1e3 * seconds:.1f} ms after it had {count} of its files, to {to}"
        turn.wait(process, lambda: files.is_dir() and len(os.listdir(files)) >= count)
    time.sleep(seconds)
    turn.kill(process)
    turn.in_the_midst = staging_of(destination).exists() and not destination.exists()
    if destination.exists():
        if contents_of(destination) != whole:
            turn.note(HALF, f"{destination} is not what an undisturbed conversion gives")
        if staging_of(destination).exists():
            turn.ended(turn.start(*turn.world.convert_arguments(to)), 2)  # it is there already, and the rest is swept
            turn.note(FAILED, *left_over(turn.folder))
        return
    turn.ended(turn.start(*turn.world.convert_arguments(to)), 0)
    found = contents_of(destination)
    turn.note(UNLIKE, *(name for name in {**whole, **found} if whole.get(name) != found.get(name)))
    turn.note(FAILED, *left_over(turn.folder))


def kill_prune(turn: Round) -> None:
    """SIGKILL of `megacl checkpoint prune`, a drawn time after it took its first checkpoint out."""
    shutil.copytree(turn.world.run_dir, turn.run_dir)
    before = published(turn.run_dir)
    kept = {*SAVES[-1:], *ENDS}
    prune = ["checkpoint", "prune", str(turn.run_dir), "--keep-last", "1"]
    process = turn.start(*prune)
    seconds = turn.draw.uniform(0.0, _SAVE_SECONDS / 4)
    turn.moment = f"SIGKILL {1e3 * seconds:.1f} ms after its first deletion"
    checkpoints = turn.run_dir / "checkpoints"
    turn.wait(process, lambda: bool(left_over(checkpoints)))
    time.sleep(seconds)
    turn.kill(process)
    turn.in_the_midst = bool(left_over(checkpoints))
    turn.check_loss(kept)
    _check_all_there(turn, before, kept)
    turn.ended(turn.start(*prune), 0)
    _check_all_there(turn, before, kept)
    if {step_of(path) for path in list_checkpoints(turn.run_dir)} != {*before} & _kept_by_the_rule(before, kept):
        turn.note(FAILED, f"pruned again, it has {[*published(turn.run_dir)]}")
    turn.check_end()


def _kept_by_the_rule(before: dict[int, str], kept: set[int]) -> set[int]:
    """What --keep-last 1 keeps: phase ends, which the newest is, and the last checkpoint inside a phase."""
    return {*kept, max(step for step in before if step not in kept)}


def _check_all_there(turn: Round, before: dict[int, str], kept: set[int]) -> None:
    after = published(turn.run_dir)
    wrong = [step for step in kept if after.get(step) != before[step]]
    turn.note(LOST, *(f"the checkpoint of step {step} was to stay, and is gone or changed" for step in wrong))


def two_processes(turn: Round) -> None:
    """A second command in a run directory, or to a conversion's destination: it refuses, and the first one goes on."""
    second = turn.draw.choice(["train", "prune", "convert", "at once"])
    turn.moment = f"a second process: {second}"
    turn.in_the_midst = True
    if second == "at once":
        statuses = sorted(turn.ended(process, 0, 2)[0] for process in (turn.train(), turn.train()))
        if statuses[0] != 0:
            turn.note(FAILED, "of two that were started at once both refused")
        turn.check_end()
        return
    destination = turn.folder / "model"
    if second == "convert":
        words = turn.world.convert_arguments("hf")
        process = turn.start(*words)
        turn.wait(process, (staging_of(destination) / "conversion.json").exists)  # it has the lock by then
    else:
        words = ["checkpoint", "prune", str(turn.run_dir), "--keep-last", "1"]
        step, process = turn.draw.randint(SAVES[0] + 1, STEPS - 1), turn.train()
        turn.moment += f" at step {step}"
        turn.wait(process, lambda: steps_recorded(turn.run_dir) >= step)
    os.kill(process.popen.pid, signal.SIGSTOP)  # so that it is still there when the other one looks
    try:
        other = turn.train() if second == "train" else turn.start(*words)
        _, text = turn.ended(other, 2)
    finally:
        os.kill(process.popen.pid, signal.SIGCONT)
    if "is at work there" not in text or text.count("\n") > 3:
        turn.note(FAILED, f"the second process said {text!r}")
    turn.ended(process, 0)
    if second == "convert":
        if contents_of(destination) != turn.world.converted("hf")[1]:
            turn.note(UNLIKE, f"{destination} is not what an undisturbed conversion gives")
    else:
        turn.check_end()


def _wait_for_save(turn: Round, process: Process, step: int, *, there: bool = False) -> None:
    """Waits for the first trace of a checkpoint, under whatever name; or for its own."""
    checkpoints, name = turn.run_dir / "checkpoints", f"step-{step:08d}"
    if there:
        turn.wait(process, (checkpoints / name).exists)
    else:
        turn.wait(process, lambda: checkpoints.is_dir() and any(name in each for each in os.listdir(checkpoints)))


def _kill_run(turn: Round, process: Process) -> None:
    """Kills a run, looks at what is left, and goes on with it."""
    before = {*published(turn.run_dir)}
    turn.kill(process)
    turn.in_the_midst = bool(left_over(turn.run_dir / "checkpoints"))
    turn.check_loss(before)
    turn.go_on()
