"""The words of a schedule: operations, where chunks live, and the order in which each rank works.

A pipeline has ``stages`` ranks.  Each holds ``chunks`` runs of layers; all runs in the order in which data flow
through them are the *virtual stages*.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Literal, NamedTuple


class Kind(StrEnum):
    """What a rank does with one micro-batch in one chunk."""

    FORWARD = "F"
    BACKWARD = "B"  # both halves at once
    INPUT = (
        "I"  # the half of a backward pass that the stage before waits for: gradients of the chunk's inputs
    )
    WEIGHT = "W"  # the other half, gradients of its weights: it may wait


class Op(NamedTuple):
    kind: Kind
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


@dataclass(frozen=True)
class Placement:
    """Which rank holds which virtual stage.

    ``loop``: chunk 0 of all ranks first, then chunk 1 (Narayanan et al. 2021, figure 4).  ``v``: down the ranks
    with chunk 0 and back up with chunk 1, so that rank 0 holds the first layers and the last (Qi et al. 2024).
    """

    stages: int
    chunks: int = 1
    style: Literal["loop", "v"] = "loop"

    def __post_init__(self) -> None:
        assert self.style == "loop" or self.chunks == 2, "a V has two arms"

    @property
    def total(self) -> int:
        """Virtual stages."""
        return self.stages * self.chunks

    @property
    def last(self) -> int:
        """The virtual stage that computes the loss."""
        return self.total - 1

    def virtual_stage(self, rank: int, chunk: int) -> int:
        if self.style == "v" and chunk == 1:
            return 2 * self.stages - 1 - rank
        return chunk * self.stages + rank

    def rank(self, virtual_stage: int) -> int:
        if self.style == "v" and virtual_stage >= self.stages:
            return 2 * self.stages - 1 - virtual_stage
        return virtual_stage % self.stages

    def chunk(self, virtual_stage: int) -> int:
        return virtual_stage // self.stages


Order = tuple[Op, ...]  # what one rank computes, from first to last


@dataclass(frozen=True)
class Schedule:
    """Every rank's order for one optimizer step, and how many activations it promises to hold at most."""

    name: str
    placement: Placement
    num_micro_batches: int
    orders: tuple[Order, ...]  # by rank
    max_live: tuple[
        int, ...
    ]  # by rank: chunks' activations between their forward and their last backward half

    @cached_property
    def splits_backward(self) -> bool:
        """Whether weight gradients are computed apart."""
        return any(op.kind == Kind.WEIGHT for order in self.orders for op in order)

    @property
    def has_backward(self) -> bool:
        return any(op.kind != Kind.FORWARD for op in self.orders[0])


def peak_live(order: Order) -> int:
    """Most activations of chunks that are alive at once: from a forward to its backward, or to its weight half."""
    ends = Kind.WEIGHT if any(op.kind == Kind.WEIGHT for op in order) else Kind.BACKWARD
    live = peak = 0
    for op in order:
        live += (op.kind == Kind.FORWARD) - (op.kind == ends)
        peak = max(peak, live)
    return peak
