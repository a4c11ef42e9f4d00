"""Which corpus, and which of its samples, is sample i of a weighted blend: arithmetic, no index array.

Megatron's BlendedDataset fills an array of the run's length, which takes minutes for long runs and fails on
extreme weights.  Here the corpora stand at the leaves of a balanced tree; each fork sends its n-th arrival
left or right so that the left has received round(n * share) of n, in exact integers (Bresenham's line at
every fork). So counts are exact, never fall, sum to n, and stay within half the tree's depth of ``weight *
n``.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import lcm


class Blend:
    """A blend of ``len(weights)`` corpora; one of weight 0 is never chosen."""

    def __init__(self, weights: Sequence[float]):
        assert any(weight > 0 for weight in weights) and all(weight >= 0 for weight in weights), weights
        self.num_corpora = len(weights)
        self._chosen = [number for number, weight in enumerate(weights) if weight > 0]
        exact = [Fraction(weights[number]) for number in self._chosen]
        scale = lcm(*(share.denominator for share in exact))
        # _sums[k] is the weight of the first k chosen corpora, in whole numbers.
        self._sums = [0, *accumulate(int(share * scale) for share in exact)]

    def locate(self, sample: int) -> tuple[int, int]:
        """(corpus, sample within that corpus) of a sample of the blend, in log2(corpora) steps."""
        assert sample >= 0, sample
        low, high = 0, len(self._chosen)
        while high - low > 1:
            middle = (low + high) // 2
            left = self._left(sample, low, middle, high)
            if self._left(sample + 1, low, middle, high) > left:
                high, sample = middle, left
            else:
                low, sample = middle, sample - left
        return self._chosen[low], sample

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first ``num_samples`` samples each corpus gives: [corpora]."""
        counts = [0] * self.num_corpora
        pending = [(0, len(self._chosen), num_samples)]
        while pending:
            low, high, arrived = pending.pop()
            if high - low == 1:
                counts[self._chosen[low]] = arrived
                continue
            middle = (low + high) // 2
            left = self._left(arrived, low, middle, high)
            pending += [(low, middle, left), (middle, high, arrived - left)]
        return counts

    def _left(self, arrived: int, low: int, middle: int, high: int) -> int:
        """How many of the first ``arrived`` samples at the fork of [low, high) go to [low, middle)."""
        share, whole = self._sums[middle] - self._sums[low], self._sums[high] - self._sums[low]
        return (2 * arrived * share + whole) // (2 * whole)  # rounded to the nearest
