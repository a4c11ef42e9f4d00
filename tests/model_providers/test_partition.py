"""The heaviest stage is as light as any contiguous cut can make it, and no stage is empty."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_providers.errors import ModelError
from model_providers.partition import heaviest_stage, partition, partition_by

COSTS = st.lists(st.integers(min_value=0, max_value=20), min_size=1, max_size=9)


@given(costs=COSTS, data=st.data())
def test_no_other_cut_is_better(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(min_value=1, max_value=len(costs)))
    bounds = partition(costs, stages)
    assert bounds[0] == 0 and bounds[-1] == len(costs) and len(bounds) == stages + 1
    assert all(start < end for start, end in pairwise(bounds))
    every = ([0, *cuts, len(costs)] for cuts in combinations(range(1, len(costs)), stages - 1))
    assert heaviest_stage(costs, bounds) == min(heaviest_stage(costs, other) for other in every)


def test_methods_weigh_layers_differently() -> None:
    parameters, costs = [10, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 8]
    assert partition_by("uniform", parameters, costs, 2) == [0, 3, 6]
    assert partition_by("parameters", parameters, costs, 2) == [0, 1, 6]
    assert partition_by("cost", parameters, costs, 2) == [0, 5, 6]
    assert partition_by([0, 2, 6], parameters, costs, 2) == [0, 2, 6]


@pytest.mark.parametrize(
    ("method", "stages", "message"),
    [
        ("fair", 2, "partition=fair: unknown; choose one of uniform, parameters, cost, or a list of bounds"),
        ("cost", 4, "pp=4: only 3 layers to share out, and no stage may be empty; use pp=3 or fewer"),
        ("cost", 0, "pp=0: a pipeline has at least one stage"),
        ([0, 3, 3], 2, r"needs 3 rising bounds from 0 to 3 for pp=2, such as \[0, 1, 3\]"),
        ([0, 1, 2, 3], 2, "needs 3 rising bounds"),
        ([1, 2, 3], 2, "needs 3 rising bounds"),
        ([0, 3], 4, "pp=4: only 3 layers"),
    ],
)
def test_what_cannot_be_cut_is_refused(method: str | list[int], stages: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        partition_by(method, [1, 1, 1], [1, 1, 1], stages)


def test_a_thousand_layers_are_cut_quickly() -> None:
    bounds = partition([1.0 + (layer % 7) for layer in range(1000)], 64)
    assert len(bounds) == 65
