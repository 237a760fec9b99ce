"""The factor that keeps fp16's gradients from vanishing."""


class LossScale:
    """fp16's factor on the loss (Micikevicius et al. 2018, arXiv 1710.03740), in both engines by the same rule.

    It begins at 2^16 and is halved at each overflow. It is doubled where 2,000 updates and one more had none, 4,000 and
    one more, and so on; that is how DeepSpeed counts. It does not go below 1: what overflows then is for stability.py.
    """

    FIRST, WINDOW, LEAST = 65536.0, 2000, 1.0

    def __init__(self, value: float = FIRST, since_overflow: int = 0) -> None:
        self.value = value
        self.since_overflow = since_overflow

    def update(self, *, overflowed: bool) -> None:
        """Goes on to the next update."""
        if overflowed:
            self.value, self.since_overflow = max(self.value / 2, self.LEAST), 0
            return
        self.since_overflow += 1
        if self.since_overflow > 1 and self.since_overflow % self.WINDOW == 1:
            self.value *= 2
