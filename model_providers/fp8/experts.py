"""Routed experts' products of eight-bit operands.

Each expert is a linear of its own to the recipe: its rows and its matrix have scales that no other expert moves, so
that numbers are the same whichever rank holds it (megatron-core's grouped linears through Transformer Engine: one
quantiser for each).  A guard and those who watch see all experts' matrices of a layer as one.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from model_providers import weight_gradients
from model_providers.experts import ExpertLinear, GroupedExperts
from model_providers.fp8.config import BLOCKS, Fp8Config
from model_providers.fp8.linears import COLUMN_CUTS, ROW_CUTS, Follows
from model_providers.fp8.multiply import ALIGNMENT, multiply
from model_providers.fp8.quantised import Quantised
from model_providers.fp8.scaling import Scaling


class Part(NamedTuple):
    """One expert's rows, of those that have some on this rank."""

    place: int  # of its matrix on this rank
    expert: int  # over all ranks
    start: int
    stop: int


class Fp8ExpertProduct(torch.autograd.Function):
    """[t k] sorted by expert x [e n k] -> [t n]; expert i takes the next ``counts[i]`` rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        counts: Sequence[int],
        scaling: Scaling,
        first: int,  # expert on this rank, over all ranks
        is_trained: bool,
    ) -> torch.Tensor:
        keeps_copy = is_trained and weight.requires_grad
        output = x.new_empty(x.size(0), weight.size(1))
        parts, kept = parts_of(counts, first), []
        for place, expert, start, stop in parts:
            rows = filled(x[start:stop], scaling.facts)
            here = {"expert": expert, "num_rows": stop - start}
            given = scaling.input(rows, both=keeps_copy, is_trained=is_trained, **here)
            matrix = scaling.weight(weight[place], both=False, expert=expert)
            product = multiply(given.rows, matrix.rows, x.dtype, is_precise=False)
            output[start:stop] = product[: stop - start]
            kept.append(given.columns)
        ctx.parameter = weight  # the object that has the gradient: what is saved may come back as a copy
        ctx.scaling, ctx.parts, ctx.has_copies = scaling, parts, keeps_copy
        ctx.blocks = [columns and columns.block for columns in kept]
        tensors = [tensor for columns in kept if columns is not None for tensor in columns[:3]]
        ctx.save_for_backward(weight, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        weight, *tensors = ctx.saved_tensors
        wants_input, wants_weight = ctx.needs_input_grad[:2]
        grad_x = grad.new_empty(grad.size(0), weight.size(2)) if wants_input else None
        factors = []
        for number, (place, expert, start, stop) in enumerate(ctx.parts):
            rows = filled(grad[start:stop], ctx.scaling.facts)
            here = {"expert": expert, "num_rows": stop - start}
            given = ctx.scaling.gradient(rows, both=wants_weight, **here)
            if grad_x is not None:
                matrix = ctx.scaling.weight(weight[place], expert=expert).columns
                grad_x[start:stop] = multiply(given.rows, matrix, grad.dtype)[: stop - start]
            if wants_weight:
                payload, unit, scales = tensors[3 * number : 3 * number + 3]
                columns = Quantised(payload, unit, scales, ctx.blocks[number])
                factors.append((place, given.columns, columns))
        if not wants_weight:
            return grad_x, None, None, None, None, None
        assert ctx.has_copies
        work = partial(_weight_gradient, factors, weight.shape, weight.dtype, grad.device)
        store = weight_gradients.open_store()
        if store is None:
            return grad_x, work(), None, None, None, None
        store.put(ctx.parameter, work)
        return grad_x, None, None, None, None, None


def parts_of(counts: Sequence[int], first: int) -> list[Part]:
    """Those of the experts that have rows."""
    found, start = [], 0
    for place, count in enumerate(counts):
        if count:
            found.append(Part(place, first + place, start, start + count))
        start += count
    return found


def filled(rows: torch.Tensor, facts: Fp8Config) -> torch.Tensor:
    """On CUDA with rows of zeros up to what eight-bit products ask of the tokens, which are summed over in the weight's
    gradient; they change no scale and no sum.
    """
    lacking = -rows.size(0) % max(ALIGNMENT, BLOCKS.get(facts.recipe, 0)) if rows.is_cuda else 0
    return F.pad(rows, (0, 0, 0, lacking)) if lacking else rows


def _weight_gradient(
    factors: Sequence[tuple[int, Quantised, Quantised]],
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """[n t] x [k t] of each expert -> [e n k]; zero for an expert without rows"""
    total = torch.zeros(shape, dtype=dtype, device=device)
    for place, gradient, columns in factors:
        total[place] = multiply(gradient, columns, dtype)
    return total


class Fp8ExpertLinear(Follows, ExpertLinear):
    """``facts`` are set by subclasses."""

    facts: ClassVar[Fp8Config]

    def __init__(self, config: Any, num_experts: int, *sizes: int, cut: int, stride: int, groups: Any):
        super().__init__(config, num_experts, *sizes, cut=cut, stride=stride, groups=groups)
        self.cut, self.num_experts = COLUMN_CUTS if cut == 1 else ROW_CUTS, config.num_moe_experts
        self.scaling = Scaling(self.facts, groups.expt_tp, cut=self.cut, num_experts=self.num_experts)
        self._first = groups.ep.rank() * num_experts

    def forward(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """[t k] -> [t n]"""
        if not self.scaling.is_on:
            return super().forward(x, counts)
        is_trained = torch.is_grad_enabled()
        return Fp8ExpertProduct.apply(x, self.weight, counts, self.scaling, self._first, is_trained)


@lru_cache(maxsize=32)
def fp8_experts(chosen: Fp8Config) -> type[GroupedExperts]:
    """Experts whose matrices follow a recipe: a class, since layer specs hold classes."""

    class Linear(Fp8ExpertLinear):
        facts = chosen

    class Experts(GroupedExperts):
        linear = Linear

    return Experts
