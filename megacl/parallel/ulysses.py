"""Sequence parallelism: each rank has a part of every sequence; for attention, some heads of the whole of it.

    attend = over_sequence(ops.attention, ranks)         # (q_BHTE, k_BKTE, v_BKTE, scale) -> BHTE, T this rank's part

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509): an all-to-all before attention and another behind it; the
rest of a layer looks at one token at a time and needs none.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megacl.parallel.ranks import Ranks


def over_sequence(attend: Callable[..., Tensor], ranks: Ranks) -> Callable[..., Tensor]:
    """An attention op on this rank's part of each row, by way of `attend` on whole rows of a part of the heads.

    The numbers of query and of key/value heads must divide by ranks.sp_size; what follows q, k and v, bounds and scale,
    is of whole rows.
    """
    from deepspeed.sequence.layer import DistributedAttention  # takes a second

    def whole_rows(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, *rest: Any) -> Tensor:
        return attend(q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2), *rest).transpose(1, 2)

    exchange = DistributedAttention(whole_rows, ranks.sp_group, scatter_idx=2, gather_idx=1)

    def attend_over_sequence(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, *rest: Any) -> Tensor:
        by_time = (x.transpose(1, 2) for x in (q_BHTE, k_BKTE, v_BKTE))
        mixed_BTHE: Tensor = exchange(*by_time, 0, None, *rest)  # 0: the batch's dimension; None: no rotary tables
        return mixed_BTHE.transpose(1, 2)

    return attend_over_sequence
