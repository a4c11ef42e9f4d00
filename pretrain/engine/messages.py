"""Tensors from stage to stage: posted in the order that a plan fixed, waited for where they are needed.

Nothing blocks when it is posted.  What the first message of a kind looks like is told by the sender in its place in
that order, and remembered for every micro-batch of the same size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pretrain.engine.layers import Wire
from pretrain.engine.schedules.streams import Mode
from pretrain.engine.schedules.transfers import Message, Send


class Shape(NamedTuple):
    """One tensor on the wire."""

    size: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Arrival:
    """Tensors under way to this rank."""

    tensors: list[torch.Tensor]
    works: list[Any] = field(default_factory=list)

    def wait(self) -> list[torch.Tensor]:
        for work in self.works:
            work.wait()
        return self.tensors


class Mailbox:
    """This rank's messages within its pipeline.

    ``channel`` opens a process group for each kind and direction, so that nothing waits for anything else; ``pair``
    posts messages one by one on the pipeline's own group, ``batch`` those together that a plan has together.
    """

    def __init__(self, group: dist.ProcessGroup, *, stage: int, mode: Mode, device: torch.device):
        self._group, self._stage, self._mode, self._device = group, stage, mode, device
        self._peers = dist.get_process_group_ranks(group)
        self._under_way: list[tuple[Any, torch.Tensor]] = []  # sent tensors live until they are gone
        self._channels: dict[tuple[str, bool], dist.ProcessGroup] = {}

    def open_channels(self, pipelines: Sequence[Sequence[int]]) -> None:
        """Make the groups of ``channel`` mode; every rank of the world calls it with all pipelines' ranks."""
        for ranks in pipelines:
            for what in ("activation", "gradient"):
                for is_upwards in (False, True):
                    group = dist.new_group(list(ranks))
                    if list(ranks) == self._peers:
                        self._channels[what, is_upwards] = group

    def post(self, messages: Sequence[tuple[Message, list[torch.Tensor]]]) -> dict[int, list[Any]]:
        """Start sends and receives, in this order; returns the works of each message by its number."""
        entries = [
            (
                message,
                dist.P2POp(
                    self._verb(message), on_wire(tensor), self._peers[message.peer], self._of(message)
                ),
            )
            for message, tensors in messages
            for tensor in tensors
        ]
        works = self._start([entry for _, entry in entries])
        started: dict[int, list[Any]] = {message.number: [] for message, _ in messages}
        for (message, entry), work in zip(entries, works, strict=True):
            if isinstance(message, Send):
                self._under_way.append((work, entry.tensor))
            else:
                started[message.number].append(work)
        return started

    def tell_shapes(self, shapes: list[Shape], peer: int) -> None:
        dist.send_object_list([shapes], self._peers[peer], group=self._group, device=self._device)

    def hear_shapes(self, peer: int) -> list[Shape]:
        heard: list[Any] = [None]
        dist.recv_object_list(heard, self._peers[peer], group=self._group, device=self._device)
        return heard[0]

    def all_sent(self) -> None:
        """Wait until nothing of this rank's is under way."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way = []

    def forget_sent(self) -> None:
        """Let go of tensors that have arrived."""
        self._under_way = [entry for entry in self._under_way if not entry[0].is_completed()]

    def _start(self, entries: list[dist.P2POp]) -> list[Any]:
        if self._mode != "batch" or len(entries) < 2:
            return [entry.op(entry.tensor, entry.peer, entry.group) for entry in entries]
        works = dist.batch_isend_irecv(entries)
        return works if len(works) == len(entries) else works * len(entries)  # NCCL has one work for all

    def _verb(self, message: Message) -> Callable[..., Any]:
        return dist.isend if isinstance(message, Send) else dist.irecv

    def _of(self, message: Message) -> dist.ProcessGroup:
        if not self._channels:
            return self._group
        sender, receiver = (
            (self._stage, message.peer) if isinstance(message, Send) else (message.peer, self._stage)
        )
        return self._channels[message.what, sender < receiver]


def on_wire(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as the libraries take it: no graph, contiguous, and booleans as bytes, which NCCL does not know."""
    plain = tensor.detach().contiguous()
    return plain.view(torch.uint8) if plain.dtype == torch.bool else plain


def as_list(wire: Wire) -> list[torch.Tensor]:
    return [wire] if isinstance(wire, torch.Tensor) else list(wire)


def as_wire(tensors: list[torch.Tensor]) -> Wire:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def with_gradient(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Those that a backward pass has gradients of."""
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def shapes_of(tensors: Sequence[torch.Tensor]) -> list[Shape]:
    return [Shape(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
