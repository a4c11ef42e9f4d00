"""Ranks of tests themselves: a failure is reported and survived, and nothing is left behind."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, RankPool

pytestmark = pytest.mark.ranks


def _sum_of_ranks(offset: int) -> int:
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return int(value)


def _world_size() -> int:
    return dist.get_world_size()


def _fail_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("this rank breaks")
    dist.barrier()


def test_every_rank_returns_its_result(ranks: RankPool) -> None:
    assert ranks.run(_sum_of_ranks, 4, 10) == [46] * 4


def test_worlds_of_different_sizes_follow_each_other(ranks: RankPool) -> None:
    assert [ranks.run(_world_size, size) for size in (1, 3, 2)] == [[1], [3] * 3, [2] * 2]


def test_a_failing_rank_is_named_and_the_pool_recovers() -> None:
    pool = RankPool(size=2)
    with pytest.raises(RankError, match=r"rank 1 of 2 failed first[\s\S]*this rank breaks"):
        pool.run(_fail_on_last, 2)
    assert pool.run(_sum_of_ranks, 2, 0) == [1, 1]
