"""A trained model, to be evaluated or sampled from: a checkpoint's weights in an engine, without its optimizer.

checkpoint = open_checkpoint(find_checkpoint("runs/x", warn))
engine, ranks = engine_of(checkpoint, start_ranks(timeout=600))
"""

import dataclasses

from megacl.checkpoint import Checkpoint
from megacl.engine import Engine, build_engine, device_here
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks


def engine_of(checkpoint: Checkpoint, ranks: Ranks) -> tuple[Engine, Ranks]:
    """An engine that holds a checkpoint's weights, and the ranks in the groups that it has. Every rank calls it.

    On one rank it is the native one, whatever trained the model. Several share the layers as in training, and sequences
    are dealt out whole. It computes as in training on a GPU, and in fp32 without compiling on a CPU.
    """
    config = checkpoint.config
    several = ranks.world_size > 1
    how = dataclasses.replace(
        config.engine,
        kind=config.engine.kind if several else "native",
        tensor_parallel=config.engine.tensor_parallel if several else 1,
        sequence_parallel=1,
        kernels={},  # they were named for the machine that trained
    )
    if device_here() == "cpu":  # nor do 16 bits and compiling pay on a CPU
        how = dataclasses.replace(how, precision="fp32", compile=False)
    ranks = ranks.arrange(tensor_parallel=how.tensor_parallel, sequence_parallel=1)
    model = build_model(config.model, seed=None, device="meta")
    if config.boundaries == "attention":
        model.document_end = checkpoint.tokenizer().eos_id
    engine = build_engine(model, engine=how, optimizer=config.optimizer, ranks=ranks)
    load = checkpoint.load_weights()
    engine.import_state(lambda name: {"weight": load(name)}, optimizer_step=0, loss_scale=None)
    return engine, ranks
