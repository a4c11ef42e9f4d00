from fractions import Fraction
from itertools import pairwise
from math import ceil, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.blend import Blend

WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-12, 1e12), st.floats(0.01, 1.0)), min_size=1, max_size=12
).filter(any)


@given(weights=WEIGHTS, num_samples=st.integers(0, 200))
def test_samples_of_each_corpus_come_in_order_without_gaps(weights: list[float], num_samples: int) -> None:
    blend = Blend(weights)
    seen = [0] * len(weights)
    for sample in range(num_samples):
        corpus, within = blend.locate(sample)
        assert within == seen[corpus]
        seen[corpus] += 1
    assert seen == blend.counts(num_samples)


@given(weights=WEIGHTS, num_samples=st.integers(0, 10**18))
def test_counts_are_exact_and_near_their_share(weights: list[float], num_samples: int) -> None:
    counts = Blend(weights).counts(num_samples)
    total = sum(map(Fraction, weights))
    bound = max(1, ceil(log2(len(weights)))) / 2 if len(weights) > 1 else 0
    assert sum(counts) == num_samples
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - num_samples * Fraction(weight) / total) <= bound
        assert count == 0 or weight > 0


@given(weights=WEIGHTS, points=st.lists(st.integers(0, 10**15), min_size=2, max_size=6))
def test_counts_never_fall(weights: list[float], points: list[int]) -> None:
    counts = [Blend(weights).counts(point) for point in sorted(points)]
    for before, after in pairwise(counts):
        assert all(low <= high for low, high in zip(before, after, strict=True))


@given(weights=WEIGHTS, sample=st.integers(0, 10**18))
def test_any_sample_is_found_without_those_before_it(weights: list[float], sample: int) -> None:
    blend = Blend(weights)
    corpus, within = blend.locate(sample)
    assert within == blend.counts(sample)[corpus]
    assert blend.counts(sample + 1)[corpus] == within + 1


def test_extreme_weights_are_kept_exactly() -> None:
    blend = Blend([1.0, 1e-12, 0.0])
    assert blend.counts(10**12) == [10**12 - 1, 1, 0]
    assert blend.locate(0) == (0, 0)


def test_only_the_proportions_matter() -> None:
    assert [Blend([1, 3]).locate(n) for n in range(50)] == [Blend([0.25, 0.75]).locate(n) for n in range(50)]


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0]])
def test_weights_that_the_config_refuses_never_arrive(weights: list[float]) -> None:
    with pytest.raises(AssertionError):
        Blend(weights)
