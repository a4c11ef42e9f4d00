"""How tokens come to their experts and back: megatron-core's dispatchers, and one that goes through nodes in two steps.

**Hierarchical** (inside the node first, as in DeepSpeed-MoE, Rajbhandari et al. 2022, arXiv:2201.05596, section 5.2): a
rank gives the tokens for rank l of any node to rank l of its own node, and that one sends what it has gathered to
rank l of each node.  So a rank sends one message to each other node instead of one to each of its ranks: fewer and
larger, of the same bytes.  What arrives lies in the same order as after a single all-to-all, so nothing else changes.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class Nodes(NamedTuple):
    """The expert group's ranks by nodes, the same number on each, neighbours in the group on one node."""

    inner: Any  # group of this node's ranks
    outer: Any  # group of the ranks with this one's place on their nodes
    ranks_per_node: int


@dataclass
class Traffic:
    """What this rank sent in all-to-alls, forward passes only; the backward pass sends as much again."""

    bytes_within_node: int = 0
    bytes_between_nodes: int = 0
    messages_within_node: int = 0
    messages_between_nodes: int = 0


class AllToAll(MoEAlltoAllTokenDispatcher):
    """megatron-core's, counting its traffic, and without streams where there are none."""

    tokens_per_expert: torch.Tensor | None
    input_splits: Any
    output_splits: Any
    output_splits_tp: Any

    def __init__(self, *arguments: Any, nodes: Nodes | None = None, **named: Any):
        super().__init__(*arguments, **named)
        self.traffic = Traffic()
        self.nodes = nodes
        self._rank = self.ep_group.rank()

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, probs = permutated_local_input_tokens, permuted_probs
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", self.tokens_per_expert
        )
        if self.ep_size == 1:
            return tokens, probs
        self._plan_routes()
        for tensor in (tokens, probs):
            self._count(tensor)
        return self._there(tokens), self._there(probs)

    def token_combine(
        self, hidden_states: torch.Tensor, async_finish: bool = True, allocate_on_comm_stream: bool = True
    ) -> torch.Tensor:
        if self.ep_size == 1:
            return hidden_states
        self._count(hidden_states, back=True)
        return self._back(hidden_states)

    def _plan_routes(self) -> None:
        """What must be known before the first message."""

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        return all_to_all(self.ep_group, tensor, self.output_splits, self.input_splits)

    def _back(self, tensor: torch.Tensor) -> torch.Tensor:
        return all_to_all(self.ep_group, tensor, self.input_splits, self.output_splits)

    def _count(self, tensor: torch.Tensor, *, back: bool = False) -> None:
        splits = self._counts(tensor.size(0), back=back)
        row_bytes = tensor.itemsize * tensor[:1].numel() if tensor.size(0) else 0
        for peer, rows in enumerate(splits):
            if peer != self._rank:
                self._note(self._is_near(peer), rows * row_bytes)

    def _counts(self, rows: int, *, back: bool) -> list[int]:
        splits = self.output_splits if back else self.input_splits
        if splits is None:  # padded to capacity: the same for all
            return [rows // self.ep_size] * self.ep_size
        return [int(split) for split in splits]

    def _is_near(self, peer: int) -> bool:
        if self.nodes is None:
            return True
        return peer // self.nodes.ranks_per_node == self._rank // self.nodes.ranks_per_node

    def _note(self, is_near: bool, num_bytes: int) -> None:
        if is_near:
            self.traffic.messages_within_node += 1
            self.traffic.bytes_within_node += num_bytes
        else:
            self.traffic.messages_between_nodes += 1
            self.traffic.bytes_between_nodes += num_bytes

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The counts that the host needs; on a CPU they are there."""
        if tokens_per_expert is None or tokens_per_expert.is_cuda or self._has_splits_on_cuda():
            return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == self.cuda_dtoh_point and not self.drop_and_pad:
            self.input_splits, self.output_splits, self.output_splits_tp = (
                splits.numpy() if isinstance(splits, torch.Tensor) else splits
                for splits in (self.input_splits, self.output_splits, self.output_splits_tp)
            )
        return tokens_per_expert

    def _has_splits_on_cuda(self) -> bool:
        return isinstance(self.input_splits, torch.Tensor) and self.input_splits.is_cuda


class Routes(NamedTuple):
    """Rows of one rank's two steps, by peer, and the orders of the pieces in between."""

    first_sent: list[int]  # to each rank of this node
    first_got: list[int]
    second_sent: list[int]  # to each node
    second_got: list[int]
    pieces_out: list[int]  # as the tokens lie: by node, then by place on it
    order_out: list[int]  # as the first step takes them
    pieces_mid: list[int]  # as they arrive from this node's ranks: by rank, then by node
    order_mid: list[int]  # as the second step takes them


class HierarchicalAllToAll(AllToAll):
    """The same in two steps; see the module's docstring."""

    def _plan_routes(self) -> None:
        assert self.nodes is not None
        mine = torch.tensor(self._counts(int(self.num_out_tokens), back=False), device=self._wire_device())
        rows = [torch.empty_like(mine) for _ in range(self.ep_size)]
        dist.all_gather(rows, mine, group=self.ep_group)
        self._routes = routes(
            torch.stack(rows).tolist(), rank=self._rank, ranks_per_node=self.nodes.ranks_per_node
        )

    def _wire_device(self) -> torch.device:
        return self.probs.device

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        way, nodes = self._routes, self.nodes
        assert nodes is not None
        tensor = reorder(tensor, way.pieces_out, way.order_out)
        tensor = all_to_all(nodes.inner, tensor, way.first_got, way.first_sent)
        tensor = reorder(tensor, way.pieces_mid, way.order_mid)
        return all_to_all(nodes.outer, tensor, way.second_got, way.second_sent)

    def _back(self, tensor: torch.Tensor) -> torch.Tensor:
        way, nodes = self._routes, self.nodes
        assert nodes is not None
        tensor = all_to_all(nodes.outer, tensor, way.second_sent, way.second_got)
        tensor = restore(tensor, way.pieces_mid, way.order_mid)
        tensor = all_to_all(nodes.inner, tensor, way.first_sent, way.first_got)
        return restore(tensor, way.pieces_out, way.order_out)

    def _count(self, tensor: torch.Tensor, *, back: bool = False) -> None:
        way, nodes = self._routes, self.nodes
        assert nodes is not None
        row_bytes = tensor.itemsize * tensor[:1].numel() if tensor.size(0) else 0
        here, place = divmod(self._rank, nodes.ranks_per_node)
        steps = ((way.first_got, place, True), (way.second_got, here, False))
        if not back:
            steps = ((way.first_sent, place, True), (way.second_sent, here, False))
        for splits, own, is_near in steps:
            for peer, rows in enumerate(splits):
                if peer != own:
                    self._note(is_near, rows * row_bytes)


def routes(rows: list[list[int]], *, rank: int, ranks_per_node: int) -> Routes:
    """``rows[i][j]``: what rank i has for rank j, neighbours on one node."""
    size, inner = len(rows), ranks_per_node
    nodes = size // inner
    here, place = divmod(rank, inner)
    home = [here * inner + peer for peer in range(inner)]  # this node's ranks
    same = [node * inner + place for node in range(nodes)]  # the ranks in this one's place
    return Routes(
        first_sent=[sum(rows[rank][node * inner + peer] for node in range(nodes)) for peer in range(inner)],
        first_got=[sum(rows[peer][there] for there in same) for peer in home],
        second_sent=[sum(rows[peer][there] for peer in home) for there in same],
        second_got=[sum(rows[node * inner + peer][rank] for peer in range(inner)) for node in range(nodes)],
        pieces_out=rows[rank],
        order_out=[node * inner + peer for peer in range(inner) for node in range(nodes)],
        pieces_mid=[rows[peer][there] for peer in home for there in same],
        order_mid=[peer * nodes + node for node in range(nodes) for peer in range(inner)],
    )


def reorder(tensor: torch.Tensor, pieces: list[int], order: list[int]) -> torch.Tensor:
    """The tensor's pieces in another order."""
    parts = tensor.split(pieces)
    return torch.cat([parts[index] for index in order])


def restore(tensor: torch.Tensor, pieces: list[int], order: list[int]) -> torch.Tensor:
    """The inverse of `reorder`."""
    parts = dict(zip(order, tensor.split([pieces[index] for index in order]), strict=True))
    return torch.cat([parts[index] for index in range(len(pieces))])
