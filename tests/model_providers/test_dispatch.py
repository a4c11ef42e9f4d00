"""Two steps through nodes bring every token where one step does, with fewer messages between nodes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from model_providers.dispatch import Nodes, reorder, restore, routes
from model_providers.families import build_plan
from model_providers.layout import Layout
from model_providers.random_streams import seed_streams
from model_providers.router import set_loss_scale
from tests.model_providers.plans import batch, llama_like

MOE = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 16}


@settings(deadline=None)
@given(st.data())
def test_the_two_steps_bring_every_piece_in_the_order_of_one(data: Any) -> None:
    """Pieces are named (from, to, number); messages are carried by hand between simulated ranks."""
    nodes, inner = data.draw(st.sampled_from([(2, 2), (3, 2), (2, 3), (4, 1), (1, 3)]))
    size = nodes * inner
    rows = [[data.draw(st.integers(0, 3)) for _ in range(size)] for _ in range(size)]
    ways = [routes(rows, rank=rank, ranks_per_node=inner) for rank in range(size)]
    held = [[(i, j, k) for j in range(size) for k in range(rows[i][j])] for i in range(size)]
    held = [cut(held[r], ways[r].pieces_out, ways[r].order_out) for r in range(size)]
    groups = [[n * inner + p for p in range(inner)] for n in range(nodes)]
    held = exchanged(held, groups, [way.first_sent for way in ways], [way.first_got for way in ways])
    held = [cut(held[r], ways[r].pieces_mid, ways[r].order_mid) for r in range(size)]
    groups = [[n * inner + p for n in range(nodes)] for p in range(inner)]
    held = exchanged(held, groups, [way.second_sent for way in ways], [way.second_got for way in ways])
    assert held == [[(i, j, k) for i in range(size) for k in range(rows[i][j])] for j in range(size)]


def cut(items: list[Any], pieces: list[int], order: list[int]) -> list[Any]:
    numbers = torch.arange(len(items))
    again = reorder(numbers, pieces, order)
    assert torch.equal(restore(again, pieces, order), numbers)
    return [items[i] for i in again.tolist()]


def exchanged(
    held: list[list[Any]], groups: list[list[int]], sent: list[list[int]], got: list[list[int]]
) -> list[list[Any]]:
    """An all-to-all within each group, which must announce what it sends."""
    after: list[list[Any]] = [[] for _ in held]
    for ranks in groups:
        pieces = {}
        for rank in ranks:
            assert sum(sent[rank]) == len(held[rank])
            start = 0
            for peer, length in zip(ranks, sent[rank], strict=True):
                pieces[rank, peer] = held[rank][start : start + length]
                start += length
        for rank in ranks:
            assert [len(pieces[peer, rank]) for peer in ranks] == got[rank]
            after[rank] = [item for peer in ranks for item in pieces[peer, rank]]
    return after


def step(dispatcher: str) -> tuple[float, list[torch.Tensor], Any]:
    """Loss, gradients and traffic of one pass on a rank; two nodes of two ranks."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=4, expert_tensor_parallel_size=1)
    rank = dist.get_rank()
    inner = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    outer = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][rank % 2]
    model = llama_like(moe=MOE, num_layers=1)
    plan = build_plan(
        model,
        Layout(dp=4, ep=4, dispatcher=dispatcher),  # type: ignore[arg-type]
        ProcessGroupCollection.use_mpu_process_groups(),
        seed=1,
        sequence_length=16,
        nodes=Nodes(inner, outer, 2),
    )
    seed_streams(1)
    set_loss_scale(1.0, torch.device("cpu"))
    value, targets = batch(model, seed=rank)
    modules = [layer.build() for layer in plan.layers]
    for module in modules:
        value = module(value)
    loss = plan.loss(value, targets)
    loss.backward()
    gradients = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    return loss.item(), gradients, getattr(modules[1].mlp.token_dispatcher, "traffic", None)


@pytest.mark.ranks
def test_all_dispatchers_compute_the_same_and_the_hierarchical_one_sends_fewer_messages(ranks: Any) -> None:
    flat = ranks.run(step, 4, "alltoall")
    for dispatcher in ("allgather", "hierarchical"):
        for (loss, gradients, _), (wanted, theirs, _) in zip(
            ranks.run(step, 4, dispatcher), flat, strict=True
        ):
            assert loss == pytest.approx(wanted, rel=1e-6)
            for one, other in zip(gradients, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for (_, _, two_steps), (_, _, one_step) in zip(ranks.run(step, 4, "hierarchical"), flat, strict=True):
        # There and back, tokens and weights, to one rank of the other node instead of two.
        assert one_step.messages_between_nodes == 2 * two_steps.messages_between_nodes == 6
        assert one_step.messages_within_node == two_steps.messages_within_node == 3
    between = [
        sum(t.bytes_between_nodes for _, _, t in runs) for runs in (ranks.run(step, 4, "hierarchical"), flat)
    ]
    assert between[0] == between[1] > 0, "the same bytes cross, in larger pieces"
