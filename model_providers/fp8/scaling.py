"""One linear's operands in eight bits, by its recipe: which blocks share a scale, and where the scale comes from.

Inputs and weights are E4M3.  Gradients of outputs are E5M2 under per-tensor scaling (Micikevicius et al. 2022,
arXiv:2209.05433, section 3.1) and E4M3 under finer blocks (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).  An operand
that is cut over tensor ranks has one scale over all of them, so that every layout rounds alike.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist

from model_providers.fp8 import copies
from model_providers.fp8.config import BLOCKS, Fp8Config
from model_providers.fp8.formats import E4M3, E5M2, Format, largest_magnitude
from model_providers.fp8.history import GRADIENT, INPUT, AmaxHistory
from model_providers.fp8.nvfp4 import quantise_nvfp4, rotate, unit_of_whole
from model_providers.fp8.quantised import Quantised, Sides, fine_sides, quantise_blocks, whole_sides
from model_providers.random_streams import generator_here

Operand = Literal["input", "weight", "gradient"]
Look = Callable[[Operand, torch.Tensor, Quantised], None]


class Scaling:
    """Of one linear, or of the same matrix of all experts of a layer, each of which has scales of its own.

    ``cut``: the operands of which a rank of ``group`` holds a share, never mind the sequence's.  ``num_experts``: over
    all ranks; an ``expert`` is one of these.
    """

    def __init__(self, facts: Fp8Config, group: Any, *, cut: frozenset[Operand], num_experts: int = 1):
        self.facts, self.name = facts, ""  # the whole model's name of the linear, once it is built
        self.has_begun, self.is_barred = True, False  # its first step has come; a guard took it out
        self.is_paused = False  # out for a moment
        self.strikes = 0  # watched steps in a row on which it was bad
        self.look: Look | None = None  # sees every operand of training once, while someone watches
        self.history = AmaxHistory(facts.amax_history, num_experts) if facts.recipe == "delayed" else None
        self._group, self._cut, self._num_experts = group, cut, num_experts
        self._copies: dict[int, tuple[int, Sides]] = {}  # by expert; with the step

    @property
    def is_on(self) -> bool:
        return self.has_begun and not self.is_barred and not self.is_paused

    def num_copies(self, operand: Operand) -> int:
        """How many tensor ranks hold the same numbers of it."""
        return 1 if self._group is None or operand in self._cut else int(self._group.size())

    def input(
        self,
        x: torch.Tensor,
        *,
        both: bool,
        is_trained: bool,
        expert: int = 0,
        num_rows: int | None = None,
    ) -> Sides:
        """[t k] -> rows [t k], and for the weight's gradient columns [k t]; past scales learn from training only.

        ``num_rows``: behind which all are zeros that fill ``x`` up, and nobody sees them.
        """
        if self.history is not None and is_trained:
            self.history.note(INPUT, largest_magnitude(x), expert)
        return self._quantise("input", x, both=both, is_shown=is_trained, expert=expert, num_rows=num_rows)

    def gradient(
        self, grad: torch.Tensor, *, both: bool, expert: int = 0, num_rows: int | None = None
    ) -> Sides:
        """[t n] -> rows [t n], columns [n t]"""
        if self.history is not None:
            self.history.note(GRADIENT, largest_magnitude(grad), expert)
        return self._quantise("gradient", grad, both=both, expert=expert, num_rows=num_rows)

    def weight(self, weight: torch.Tensor, *, both: bool = True, expert: int = 0) -> Sides:
        """[n k] -> rows [n k], columns [k n]; kept for the rest of the step, so with columns, asked for or not."""
        step = copies.current()
        kept = self._copies.get(expert)
        if step is not None and kept is not None and kept[0] == step:
            return kept[1]
        sides = self._quantise("weight", weight.detach(), both=both or step is not None, expert=expert)
        if step is None:
            self._copies.clear()
        else:
            self._copies[expert] = (step, sides)
        return sides

    def let_go(self) -> None:
        """Of copies, whose weights change."""
        self._copies.clear()

    def _quantise(
        self,
        operand: Operand,
        x: torch.Tensor,
        *,
        both: bool,
        is_shown: bool = True,
        expert: int = 0,
        num_rows: int | None = None,
    ) -> Sides:
        """``is_shown``: not where a forward pass is no part of training, or is only gathered once more."""
        sides = self._sides(operand, x, expert, both=both)
        if self.look is not None and is_shown:
            self.look(operand, x[:num_rows], sides.rows.first(num_rows))
        return sides

    def _sides(self, operand: Operand, x: torch.Tensor, expert: int, *, both: bool) -> Sides:
        recipe = self.facts.recipe
        if recipe in ("delayed", "current"):
            return self._by_tensor(operand, x, expert, both=both)
        if recipe == "nvfp4":
            return self._four_bits(operand, x, expert, both=both)
        return self._by_block(operand, x, both=both)

    def _by_tensor(self, operand: Operand, x: torch.Tensor, expert: int, *, both: bool) -> Sides:
        form: Format = E5M2 if operand == "gradient" else E4M3
        magnitude = self._magnitude(operand, x, expert)
        return whole_sides(x, form, magnitude, margin=self.facts.margin, both=both)

    def _magnitude(self, operand: Operand, x: torch.Tensor, expert: int) -> torch.Tensor:
        """A weight's own magnitude is known when its copy is made, so it is never a past one."""
        known = None
        if self.history is not None and operand != "weight":
            known = self.history.magnitude(INPUT if operand == "input" else GRADIENT, expert)
        if known is None:
            known = self._over_ranks(operand, largest_magnitude(x))
        return known

    def _by_block(self, operand: Operand, x: torch.Tensor, *, both: bool) -> Sides:
        size = BLOCKS[self.facts.recipe]
        if operand == "weight" and self.facts.recipe == "blockwise":
            rows = quantise_blocks(x, E4M3, (size, size))
            return Sides(rows, rows.transposed() if both else None)
        return fine_sides(x, size, both=both)

    def _four_bits(self, operand: Operand, x: torch.Tensor, expert: int, *, both: bool) -> Sides:
        unit = unit_of_whole(self._over_ranks(operand, largest_magnitude(x)))
        size = BLOCKS[self.facts.recipe]
        if operand == "weight":
            rows = quantise_nvfp4(x, unit, (size, size))
            return Sides(rows, rows.transposed() if both else None)
        chance = None
        if operand == "gradient":
            name = self.name if self._num_experts == 1 else f"{self.name}.{expert}"
            chance = generator_here(name, x.device, is_cut=operand in self._cut)
        rows = quantise_nvfp4(x, unit, (1, size), chance)
        if not both:
            return Sides(rows, None)
        turned = rotate(x.t())
        turned_unit = unit_of_whole(self._over_ranks(operand, largest_magnitude(turned)))
        return Sides(rows, quantise_nvfp4(turned, turned_unit, (1, size), chance))

    def _over_ranks(self, operand: Operand, magnitude: torch.Tensor) -> torch.Tensor:
        is_alone = self._group is None or self._group.size() == 1  # None: torch.distributed is not in use
        if operand in self._cut and not is_alone:
            magnitude = magnitude.clone()
            dist.all_reduce(magnitude, op=dist.ReduceOp.MAX, group=self._group)
        return magnitude

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember beside weights."""
        history = {} if self.history is None else {"history": self.history.state()}
        decided = {"recipe": self.facts.recipe, "is_barred": self.is_barred, "strikes": self.strikes}
        return {**decided, **history}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """What was decided about another recipe does not bind this one."""
        if state.get("recipe", self.facts.recipe) == self.facts.recipe:
            self.is_barred, self.strikes = bool(state["is_barred"]), int(state.get("strikes", 0))
        if self.history is not None and "history" in state:
            self.history.restore(state["history"], device)
