"""Random numbers of one sample: a pure function of a key, with every version of every library.

numpy promises the raw output of its bit generators, not what its distributions make of it (NEP 19).
"""

import numpy as np

from data_tools.permutation import key_of


class Draws:
    """A stream of numbers under facts such as a seed and a sample's number."""

    def __init__(self, *facts: str | int):
        self._bits = np.random.Philox(key=key_of(*facts))

    def uniform(self, count: int) -> np.ndarray:
        """In [0, 1): float64 [count]"""
        return (self._bits.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integer(self, low: int, high: int) -> int:
        """In [low, high)"""
        return low + int(self.uniform(1)[0] * (high - low))

    def integers(self, high: int, count: int) -> np.ndarray:
        """In [0, high): int64 [count]"""
        return (self.uniform(count) * high).astype(np.int64)

    def order(self, count: int) -> np.ndarray:
        """0..count-1, shuffled: int64 [count]"""
        return np.argsort(self.uniform(count), kind="stable")

    def chance(self, probability: float) -> bool:
        return bool(self.uniform(1)[0] < probability)

    def geometric(self, p: float, largest: int) -> int:
        """1, 2, ... with probability p (1 - p)^(k - 1), cut off above ``largest`` and made whole again."""
        total = 1.0 - (1.0 - p) ** largest
        u = float(self.uniform(1)[0]) * total
        return min(largest, 1 + int(np.log1p(-u) / np.log1p(-p)))
