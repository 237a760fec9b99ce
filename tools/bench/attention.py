"""Attention inside documents: the time of each form, beside plain causal attention over the whole sequences.

    python tools/bench/attention.py            # as wide and long as the CPU or GPU here makes sense of

Forward and backward, in milliseconds, the least of some repetitions. On a CPU in fp32; on a GPU in bf16.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from megacl import kernels
from megacl.model.layers import find_documents

BATCH, HEADS, WIDTH = 4, 8, 32
LENGTHS = (512, 2048)
DOCUMENTS = (50, 200, 1000)
"""Tokens of a document on average."""


def milliseconds(run: Callable[[], torch.Tensor], repetitions: int = 3) -> float:
    best = float("inf")
    for _ in range(repetitions + 1):  # the first one warms up
        begun = time.perf_counter()
        run().sum().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 1e3 * best


def main() -> None:
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    forms = ["flash", "one_by_one", "reference"] if gpu else ["one_by_one", "reference"]
    print(f"{BATCH} sequences, {HEADS} heads of {WIDTH}, {device}, {dtype}, {torch.get_num_threads()} thread(s)")
    print("sequence  document  " + "".join(f"{form:>12}" for form in ["causal", *forms]))
    for length in LENGTHS:
        q, k, v = (torch.randn(BATCH, HEADS, length, WIDTH, device=device, dtype=dtype) for _ in range(3))
        for x in (q, k, v):
            x.requires_grad_()
        causal = milliseconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        for tokens in DOCUMENTS:
            ends_BT = torch.randint(0, tokens, (BATCH, length), device=device)  # 0 ends a document
            bounds, _ = find_documents(ends_BT, 0)
            times = [causal]
            for form in forms:
                attend = kernels.FORMS["document_attention"][form]
                times.append(milliseconds(lambda q=q, k=k, v=v, b=bounds, a=attend: a(q, k, v, b, WIDTH**-0.5)))
            print(f"{length:8}  {tokens:8}  " + "".join(f"{ms:12.1f}" for ms in times), flush=True)


if __name__ == "__main__":
    main()
