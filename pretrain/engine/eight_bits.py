"""What follows FP8 recipes on a rank, as engine and loop see it: steps, states, and who runs in which format."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from model_providers.fp8 import copies
from model_providers.fp8.follower import Follower
from model_providers.fp8.linears import scalings
from model_providers.fp8.scaling import Operand, Scaling
from model_providers.fp8.tally import OPERANDS, Facts, Tally, facts_of
from model_providers.fp8.transformer_engine import EightBitBlocks, eight_bit_blocks


class Row(NamedTuple):
    """What was seen of one linear, over all ranks that hold it: for each operand what `tally.facts_of` takes."""

    name: str
    sums: list[list[float]]  # [operands 6]
    peaks: list[list[float]]  # [operands 2]

    def facts(self) -> dict[Operand, Facts]:
        """Of the operands that were seen."""
        found = (facts_of(sums, peaks) for sums, peaks in zip(self.sums, self.peaks, strict=True))
        return {operand: seen for operand, seen in zip(OPERANDS, found, strict=True) if seen is not None}


class EightBits:
    """All linears of ``module`` that follow a recipe, and all blocks of Transformer Engine's; empty without FP8.

    ``group``: the ranks that hold the same layers, tensor and data parallel.  ``keeps_copies``: not under ZeRO-3, where
    a whole weight is there for a moment only.
    """

    def __init__(self, module: nn.Module, group: Any, device: torch.device, *, keeps_copies: bool):
        self.scalings: Sequence[Scaling] = tuple(scalings(module))
        self.blocks = EightBitBlocks([block for _, _, block in eight_bit_blocks(module)])
        self.followers: Sequence[Follower] = (*self.scalings, *self.blocks)
        self._group, self._device, self._keeps_copies = group, device, keeps_copies

    def begin(self, step: int) -> None:
        """Before optimizer step ``step`` (0 is the first ever): those whose time has come."""
        for follower in self.followers:
            follower.has_begun = step >= follower.facts.start_step

    def begin_passes(self) -> None:
        """Before the first forward pass of a step."""
        if self.scalings and self._keeps_copies:
            copies.begin_step()
        self.blocks.begin_passes(keeps_copies=self._keeps_copies)

    def end_passes(self) -> None:
        """After the last backward pass, before the weights change."""
        copies.end_step()
        for scaling in self.scalings:
            scaling.let_go()
        self.blocks.end_passes()

    def end_step(self, *, applied: bool) -> None:
        """Past scales learn what this step saw on all ranks that hold the layer; every rank calls it."""
        self.blocks.end_step(applied=applied)
        begun = (scaling for scaling in self.scalings if scaling.has_begun)  # alike on all ranks
        histories = [scaling.history for scaling in begun if scaling.history is not None]
        if not histories:
            return
        seen = torch.cat([history.seen.to(self._device) for history in histories])  # [linears and experts, 2]
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self._group)
        rows = seen.split([len(history.seen) for history in histories])
        for history, part in zip(histories, rows, strict=True):
            history.roll(part if applied else None)

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint must remember, by the followers' names."""
        return {follower.name: follower.state() for follower in self.followers}

    def restore(self, state: dict[str, dict[str, Any]]) -> list[str]:
        """Returns the names of those of which nothing is known: they begin anew."""
        unknown = []
        for follower in self.followers:
            if follower.name in state:
                follower.restore(state[follower.name], self._device)
            else:
                unknown.append(follower.name)
        return unknown

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, all linears run in the format of the rest of the model."""
        for scaling in self.scalings:
            scaling.is_paused = True
        try:
            yield
        finally:
            for scaling in self.scalings:
                scaling.is_paused = False

    def begin_look(self) -> None:
        """From now on every operand is looked at, until `end_look`."""
        for scaling in self.scalings:
            scaling.look = Tally(scaling, self._device)

    def end_look(self) -> list[Row]:
        """What was seen since `begin_look`, linear by linear; every rank of the stage calls it and gets the same."""
        tallies = [scaling.look for scaling in self.scalings if isinstance(scaling.look, Tally)]
        for scaling in self.scalings:
            scaling.look = None
        if not tallies:
            return []
        sums = torch.stack([tally.sums for tally in tallies])  # [linears operands 6]
        peaks = torch.stack([tally.peaks for tally in tallies])  # [linears operands 2]
        dist.all_reduce(sums, group=self._group)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=self._group)
        rows = zip(tallies, sums.tolist(), peaks.tolist(), strict=True)
        return [Row(tally.scaling.name, *row) for tally, *row in rows]

    def bar(self, names: Iterable[str]) -> None:
        """From now on these run in the format of the rest of the model, for good."""
        wanted = set(names)
        for follower in self.followers:
            follower.is_barred = follower.is_barred or follower.name in wanted
