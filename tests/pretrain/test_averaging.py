"""Gradients of finished chunks are averaged while the pipeline still works, where ZeRO allows, and only then."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.engine import averaging
from pretrain.engine.averaging import Averages, FinishedChunks, buckets
from pretrain.engine.schedules.ops import Kind, Op
from tests.opened import opened
from tests.ranks import RankPool
from tests.runs import tiny

LAYOUT = {"pp": 2, "chunks": 2, "schedule": "interleaved"}
MANY = {"batch": {"global_size": 8, "micro_size": 1}, "model__num_layers": 6}


def test_small_gradients_go_together_and_large_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "BUCKET_ELEMENTS", 10)
    sizes = [4, 4, 4, 30, 2, 2]
    gradients = [torch.zeros(size) for size in sizes] + [torch.zeros(2, dtype=torch.bfloat16)]
    found = [[gradient.numel() for gradient in bucket] for bucket in buckets(gradients)]
    assert found == [[4, 4], [4], [30], [2, 2], [2]]


def average(bucket_elements: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients that differ by rank, averaged here and by hand."""
    averaging.BUCKET_ELEMENTS = bucket_elements
    mine = [
        torch.full((3, 2), 1.0 + dist.get_rank()),
        torch.arange(5.0).t() * dist.get_rank(),
        torch.ones(40),
    ]
    strided = torch.arange(6.0).view(2, 3).t() * (1 + dist.get_rank())
    mine.append(strided)
    wanted = [gradient.clone() for gradient in mine]
    for gradient in wanted:
        dist.all_reduce(gradient)
        gradient.div_(dist.get_world_size())
    averages = Averages(dist.group.WORLD)
    averages.start(mine)
    averages.finish()
    return mine, wanted


@pytest.mark.ranks
@pytest.mark.parametrize("bucket_elements", [1, 16, 1000])
def test_averages_are_those_of_one_sum_for_each(ranks: RankPool, bucket_elements: int) -> None:
    for mine, wanted in ranks.run(average, 2, bucket_elements):
        for found, right in zip(mine, wanted, strict=True):
            assert torch.equal(found, right)


def watched_step(raw: dict[str, Any]) -> list[tuple[int, int]] | None:
    """(operations left when a chunk's averages began, gradients in them); None where they wait for the end."""
    with opened(raw) as here:
        engine = here.engine.deepspeed
        finished = engine.finished
        if finished is None:
            here.engine.train_step(here.feed.next_step())
            return None
        seen: list[tuple[int, int]] = []
        start, count = finished.averages.start, finished.count
        left = [0]

        def began(gradients: list[torch.Tensor], experts: list[torch.Tensor]) -> None:
            seen.append((left[0], len(gradients) + len(experts)))
            start(gradients, experts)

        def counted(op: Any) -> bool:
            left[0] -= 1
            return count(op)

        finished.averages.start, finished.count = began, counted
        (plan,) = [engine._plan(engine._shape.schedule, here.run.num_micro_batches)]
        left[0] = len(plan.schedule.orders[engine.stage_id])
        here.engine.train_step(here.feed.next_step())
        assert sum(number for _, number in seen) == len(list(engine.module.parameters()))
        return seen


@pytest.mark.ranks
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed": "zero0.json"},
        {"deepspeed": "zero1.json"},
        {"deepspeed": "zero1.json", "precision": "bf16"},
        {"deepspeed": "zero1.json", "layout__schedule": "zb-v"},
    ],
    ids=["zero0", "zero1", "bf16", "zb-v"],
)
def test_the_first_finished_chunk_does_not_wait_for_the_others(
    ranks: RankPool, corpus: str, out: Path, changes: dict[str, Any], tied: bool
) -> None:
    raw = tiny(corpus, out, **{**MANY, "layout": dict(LAYOUT), "model__tie_embeddings": tied, **changes})
    for seen in ranks.run(watched_step, 4, raw):
        assert seen is not None and [number for number, _ in seen][-1] == 0
        assert seen[0][0] > 0, "the first chunk's averages must be under way while others work"


def average_experts() -> list[float]:
    """Ranks 0 and 2 hold the same experts, and 1 and 3; all four are replicas of the rest."""
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    rank = dist.get_rank()
    dense, expert = torch.full((2,), float(rank)), torch.full((2,), float(10 * rank))
    averages = Averages(dist.group.WORLD, groups[rank % 2])
    averages.start([dense], [expert])
    averages.finish()
    return [dense[0].item(), expert[0].item()]


@pytest.mark.ranks
def test_experts_are_summed_over_their_copies_and_averaged_over_all_replicas(ranks: RankPool) -> None:
    assert ranks.run(average_experts, 4) == [[1.5, 5.0], [1.5, 10.0]] * 2


@pytest.mark.ranks
def test_where_deepspeed_converts_gradients_it_reduces_them_itself(
    ranks: RankPool, corpus: str, out: Path, tmp_path: Path
) -> None:
    document = tmp_path / "offload.json"
    document.write_text('{"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}')
    raw = tiny(corpus, out, **MANY, layout=dict(LAYOUT), deepspeed=str(document))
    assert ranks.run(watched_step, 4, raw) == [None] * 4


def test_a_parameter_of_two_chunks_waits_for_both() -> None:
    shared, own = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    shared.grad, own.grad = torch.ones(1), torch.ones(1)
    started: list[list[torch.Tensor]] = []
    averages = SimpleNamespace(start=lambda gradients, experts: started.append(gradients))
    chunks = FinishedChunks([[shared], [own, shared]], lambda parameter: parameter.grad, averages)  # type: ignore[arg-type, return-value]
    order = (Op(Kind.FORWARD, 0, 0), Op(Kind.FORWARD, 1, 0), Op(Kind.BACKWARD, 1, 0), Op(Kind.BACKWARD, 0, 0))
    chunks.begin(order)
    assert [chunks.count(op) for op in order] == [False, False, True, True]
    assert [len(gradients) for gradients in started] == [1, 1] and started[1][0] is shared.grad
