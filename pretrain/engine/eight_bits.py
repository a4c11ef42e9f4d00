"""What follows FP8 recipes on a rank, as engine and loop see it: steps, states, and who runs in which format."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model_providers.fp8 import copies
from model_providers.fp8.follower import Follower
from model_providers.fp8.linears import scalings
from model_providers.fp8.scaling import Scaling
from model_providers.fp8.transformer_engine import EightBitBlocks, eight_bit_blocks


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
        histories = [scaling.history for scaling in self.scalings if scaling.history is not None]
        if not histories:
            return
        seen = torch.stack([history.seen.to(self._device) for history in histories])  # [linears 2]
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self._group)
        for history, row in zip(histories, seen, strict=True):
            history.roll(row if applied else None)

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

    def bar(self, names: Iterable[str]) -> None:
        """From now on these run in the format of the rest of the model, for good."""
        wanted = set(names)
        for follower in self.followers:
            follower.is_barred = follower.is_barred or follower.name in wanted
