"""The weights of a checkpoint alone, as a checkpoint of its own: what others need who do not go on with its optimizer.

    export_weights(open_checkpoint(find_checkpoint("runs/mine@october", warn)), Path("october"))

It has the history, configuration and tokenizer of the other one, and none of its optimizer's state, which is two
thirds of it. Whatever takes a checkpoint takes it.
"""

import shutil
from pathlib import Path

from megacl.checkpoint import Checkpoint, RunState
from megacl.checkpoint_files import Contents, read_index, read_manifest
from megacl.errors import CheckpointError, ConfigError
from megacl.saving import publish_checkpoint
from megacl.tensorfile import facts_of


def export_weights(checkpoint: Checkpoint, out: Path) -> None:
    """Publishes a checkpoint's weights as the folder `out`, in which nothing else stands.

    Raises ConfigError where there is something of that name, CheckpointError where a file cannot be read, DataError
    where the disk refuses.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: is there already; name another folder.")
    index, state, meant = read_index(checkpoint.path), checkpoint.state, read_manifest(checkpoint.path)
    tensors = {name: file for name, file in index.tensors.items() if name in index.weights}

    def write(folder: Path) -> Contents:
        files = {}
        for name in sorted(set(tensors.values())):
            if not (checkpoint.path / name).is_file():
                raise CheckpointError(f"{checkpoint.path / name}: is gone; the run has pruned this checkpoint.")
            shutil.copyfile(checkpoint.path / name, folder / name)
            files[name] = facts_of(folder / name)
            if files[name] != meant.get(name):
                raise CheckpointError(f"{checkpoint.path / name}: its copy is not as the manifest says; try again.")
        return Contents(files, tensors, index.weights)

    publish_checkpoint(
        out,
        write,
        RunState(step=state.step, phase=state.phase, samples=state.samples, phase_end=state.phase_end),
        lineage=checkpoint.lineage,
        config=checkpoint.config,
        tokenizer=checkpoint.tokenizer(),
    )
