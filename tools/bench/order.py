"""How random the orders are: chi-square statistics of both beside those of numpy's permutations of the same size.

    python tools/bench/order.py --keys 200

A row a size: the mean of each statistic over the keys, with its standard error. The three statistics, of an epoch cut
into cells:

    positions    where in the epoch an item stands, against where in the source it lies
    neighbours   how far apart in the source two consecutive items lie, modulo its size
    ranks        which of 8 ranks reads an item (batches of 64), against where in the source it lies

The windowed order is that of 64 shards in windows of 8: its neighbours come from one window, and so lie closer.
"""

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megacl.data.order import WindowedOrder, permuted

Int64 = NDArray[np.int64]

CELLS, RANKS, BATCH = 10, 8, 64
SIZES = (97, 1024, 10_007, 65_536, 10**12)
DRAWS = 65_536
"""How many of an epoch are looked at where it is longer."""
SHARDS, WINDOW = 64, 8


def _chi_square(rows: Int64, columns: Int64, shape: tuple[int, int]) -> float:
    """Of a table of counts against independence."""
    counts = np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / counts.sum()
    return float(((counts - expected) ** 2 / np.maximum(expected, 1e-12)).sum())


def positions(items: Int64, n: int) -> float:
    """Of the items' places in the epoch against their places in the source."""
    places = np.arange(len(items)) * CELLS // len(items)
    return _chi_square(places, items * CELLS // n, (CELLS, CELLS))


def neighbours(items: Int64, n: int) -> float:
    """Of the distances of consecutive items, modulo n, against a uniform distribution."""
    counts = np.bincount((np.diff(items) % n) * CELLS // n, minlength=CELLS)
    edges = -(-np.arange(CELLS + 1) * n // CELLS)
    expected = np.diff(edges) - (np.arange(CELLS) == 0)  # no distance is 0
    expected = expected / (n - 1) * (len(items) - 1)
    return float(((counts - expected) ** 2 / expected).sum())


def ranks(items: Int64, n: int) -> float:
    """Of the ranks that read the items against their places in the source."""
    rank = np.arange(len(items)) % BATCH * RANKS // BATCH
    return _chi_square(rank, items * CELLS // n, (RANKS, CELLS))


STATISTICS: tuple[Callable[[Int64, int], float], ...] = (positions, neighbours, ranks)


def feistel(n: int, seed: int) -> Int64:
    """The first draws of megacl's permutation of n items, in an epoch that depends on the seed."""
    return permuted(np.arange(min(n, DRAWS)) + (seed % 5) * n, n, 0x9E37 * seed + 1)


def true(n: int, seed: int) -> Int64:
    """As many of numpy's permutation."""
    rng = np.random.default_rng(seed)
    return rng.permutation(n) if n <= DRAWS else rng.choice(n, DRAWS, replace=False)


def windowed(n: int, seed: int, window: int = WINDOW) -> Int64:
    """An epoch of the windowed order over SHARDS shards of about n / SHARDS items."""
    begins = np.arange(SHARDS + 1) * n // SHARDS
    shards, within = WindowedOrder(np.diff(begins), window, 0x9E37 * seed + 1).locate(np.arange(n))
    return begins[shards] + within


def measure(order: Callable[[int, int], Int64], n: int, keys: int) -> NDArray[np.float64]:
    """The statistics under each key: float64 [keys, 3]."""
    return np.array([[statistic(order(n, seed), n) for statistic in STATISTICS] for seed in range(keys)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keys", type=int, default=200)
    keys = parser.parse_args().keys
    print("| n | order | positions (81) | neighbours (9) | ranks (63) |\n|---|---|---|---|---|")
    for n in SIZES:
        for name, order in (("megacl", feistel), ("numpy", true), ("megacl, windowed", windowed)):
            if order is windowed and not 1000 < n < 10**6:
                continue
            found = measure(order, n, keys)
            means, errors = found.mean(0), found.std(0, ddof=1) / np.sqrt(keys)
            cells = " | ".join(f"{mean:.1f} ± {error:.1f}" for mean, error in zip(means, errors, strict=True))
            print(f"| {n:,} | {name} | {cells} |")


if __name__ == "__main__":
    main()
