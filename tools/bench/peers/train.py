"""A peer's training step, in the environment that make_peers.sh made at DIR/train; run by tools/bench/train.py.

    DIR/train/bin/python tools/bench/peers/train.py PEER SHAPE STEPS [--compile]

PEER: litgpt or transformers. SHAPE: JSON of vocab_size, hidden_size, num_layers, num_attention_heads, seq_length and
batch. The model is GPT-NeoX's: untied, biases, attention and MLP in parallel, a quarter of each head rotated, exact
GELU. The step is the peer's own loss, backward, clipping to 1, fused AdamW, in fp32 on random tokens.

Prints one JSON line: parameters; seconds and cpu (core seconds) of each step but the first three; peak, MB resident.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

WARM = 3
"""Steps before those that count: allocation, and compilation."""


def litgpt(shape: dict[str, int], compiled: bool) -> tuple[Any, Callable[..., Any]]:
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    config = Config.from_name(
        "pythia-14m",
        n_layer=shape["num_layers"],
        n_embd=shape["hidden_size"],
        n_head=shape["num_attention_heads"],
        intermediate_size=4 * shape["hidden_size"],
        block_size=shape["seq_length"],
        padded_vocab_size=shape["vocab_size"],
    )
    model = GPT(config)
    model.max_seq_length = shape["seq_length"]
    forward = torch.compile(model) if compiled else model
    return model, lambda rows: chunked_cross_entropy(forward(rows[:, :-1].contiguous()), rows[:, 1:].contiguous())


def transformers(shape: dict[str, int], compiled: bool) -> tuple[Any, Callable[..., Any]]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_attention_heads"],
        intermediate_size=4 * shape["hidden_size"],
        max_position_embeddings=shape["seq_length"],
        rotary_pct=0.25,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cache=False,
    )
    model = GPTNeoXForCausalLM(config)
    forward = torch.compile(model) if compiled else model

    def loss_of(rows: Any) -> Any:
        inputs = rows[:, :-1].contiguous()
        return forward(input_ids=inputs, labels=inputs).loss  # it moves the labels by one itself

    return model, loss_of


def main() -> None:
    peer, shape, steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    rows = torch.randint(0, shape["vocab_size"], (WARM + steps, shape["batch"], shape["seq_length"] + 1))
    model, loss_of = {"litgpt": litgpt, "transformers": transformers}[peer](shape, "--compile" in sys.argv)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    seconds, cpu = [], []
    for batch in rows:
        begun, cpu_begun = time.perf_counter(), time.process_time()
        loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - cpu_begun)
    found = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds[WARM:],
        "cpu": cpu[WARM:],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
