"""Tensor-parallel linears whose three products are of eight-bit operands.

The forward pass multiplies input and weight, the backward pass the output's gradient with the weight and with the
input; sums leave each product in the run's own format.  What is kept for the backward pass is the input's eight-bit
copy, one byte for each number instead of two or four; under sequence parallelism this rank's shard as it is, gathered
and quantised once more.  Communication, and weights' gradients that wait for a pipeline's idle moments, are those of
`linears.Product`.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import nn

from model_providers import weight_gradients
from model_providers.fp8.config import Fp8Config
from model_providers.fp8.multiply import multiply
from model_providers.fp8.quantised import Quantised
from model_providers.fp8.scaling import Operand, Scaling
from model_providers.linears import ReplicatedLinear
from model_providers.mcore_on_cpu import gather_along_first_dim, reduce, reduce_scatter_along_first_dim

COLUMN_CUTS: frozenset[Operand] = frozenset(("weight", "gradient"))
ROW_CUTS: frozenset[Operand] = frozenset(("weight", "input"))
SEQUENCE_CUTS: frozenset[Operand] = frozenset(("input", "gradient"))


class Fp8Product(torch.autograd.Function):
    """[s b k] x [n k] (+ [n]) -> [s b n], with the communication of megatron-core's linear."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # [s b k], under sequence parallelism [s/tp b k]
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sequence_parallel: bool,
        allreduce_dgrad: bool,
        group: Any,
        scaling: Scaling,
        is_trained: bool,
    ) -> torch.Tensor:
        whole = gather_along_first_dim(x, group) if sequence_parallel else x
        keeps_copy = is_trained and not sequence_parallel and weight.requires_grad
        given = scaling.input(whole.flatten(0, -2), both=keeps_copy, is_trained=is_trained)
        kept = scaling.weight(weight, both=False)
        output = multiply(given.rows, kept.rows, x.dtype, is_precise=False)
        if bias is not None:
            output += bias
        ctx.sequence_parallel, ctx.allreduce_dgrad, ctx.group = sequence_parallel, allreduce_dgrad, group
        ctx.parameter = weight  # the object that has the gradient: what is saved may come back as a copy
        ctx.scaling, ctx.has_bias, ctx.shape, ctx.dtype = scaling, bias is not None, x.shape, x.dtype
        _keep(ctx, weight, x if sequence_parallel else None, given.columns if keeps_copy else None)
        return output.view(*whole.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        weight, shard, columns = _kept(ctx)
        wants_input, wants_weight = ctx.needs_input_grad[:2]
        given = ctx.scaling.gradient(grad.flatten(0, -2), both=wants_weight)
        grad_x = grad_weight = None
        if wants_input:
            grad_x = _input_gradient(ctx, given.rows, weight).view(*grad.shape[:-1], -1)
            if ctx.sequence_parallel:
                grad_x = reduce_scatter_along_first_dim(grad_x, ctx.group)
            elif ctx.allreduce_dgrad:
                grad_x = reduce(grad_x, ctx.group)
        if wants_weight:
            assert given.columns is not None
            work = partial(
                _weight_gradient, ctx.scaling, given.columns, columns, shard, ctx.group, weight.dtype
            )
            # A hook on a weight that every tensor rank holds sums their parts of its gradient, and does not wait.
            is_part = getattr(ctx.parameter, "sequence_parallel", False)
            store = None if is_part else weight_gradients.open_store()
            if store is None:
                grad_weight = work()
            else:
                store.put(ctx.parameter, work)
        grad_bias = grad.sum(dim=tuple(range(grad.dim() - 1))) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _keep(ctx: Any, weight: torch.Tensor, shard: torch.Tensor | None, columns: Quantised | None) -> None:
    parts = (None, None, None) if columns is None else (columns.payload, columns.unit, columns.scales)
    ctx.block = None if columns is None else columns.block
    ctx.save_for_backward(weight, shard, *parts)


def _kept(ctx: Any) -> tuple[torch.Tensor, torch.Tensor | None, Quantised | None]:
    weight, shard, payload, unit, scales = ctx.saved_tensors
    return weight, shard, None if payload is None else Quantised(payload, unit, scales, ctx.block)


def _input_gradient(ctx: Any, rows: Quantised, weight: torch.Tensor) -> torch.Tensor:
    """[t n] x [n k] -> [t k]"""
    columns = ctx.scaling.weight(weight).columns
    assert columns is not None
    return multiply(rows, columns, ctx.dtype)


def _weight_gradient(
    scaling: Scaling,
    gradient: Quantised,  # [n t]
    columns: Quantised | None,  # [k t]
    shard: torch.Tensor | None,  # [s/tp b k], where there is no copy of the whole
    group: Any,
    dtype: torch.dtype,
) -> torch.Tensor:
    """-> [n k]"""
    if columns is None:
        assert shard is not None
        whole = gather_along_first_dim(shard, group).flatten(0, -2)
        columns = scaling.input(whole, both=True, is_trained=False).columns
        assert columns is not None
    return multiply(gradient, columns, dtype)


class Follows(nn.Module):
    """What has a matrix whose products follow a recipe; stands before one of our linears in the list of bases."""

    facts: ClassVar[Fp8Config]
    cut: frozenset[Operand]  # as `Scaling` takes them
    num_experts: int = 1
    scaling: Scaling


class Fp8Linear(Follows):
    """``facts`` and ``cut`` are set by subclasses."""

    tp_group: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.scaling = Scaling(self.facts, self.tp_group, cut=self.cut)

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        *args: Any,
        bias: torch.Tensor | None,
        sequence_parallel: bool,
        allreduce_dgrad: bool,
        tp_group: Any,
        **rest: Any,
    ) -> torch.Tensor:
        if not self.scaling.is_on:
            return super()._forward_impl(  # type: ignore[misc]
                input,
                weight,
                *args,
                bias=bias,
                sequence_parallel=sequence_parallel,
                allreduce_dgrad=allreduce_dgrad,
                tp_group=tp_group,
                **rest,
            )
        is_trained = torch.is_grad_enabled()
        return Fp8Product.apply(
            input, weight, bias, sequence_parallel, allreduce_dgrad, tp_group, self.scaling, is_trained
        )


@lru_cache(maxsize=32)
def fp8_linears(chosen: Fp8Config, column: type, row: type) -> tuple[type, type]:
    """The given column- and row-parallel linears, following a recipe: classes, since layer specs hold classes."""

    class Fp8Column(Fp8Linear, column):  # type: ignore[misc,valid-type]
        facts, cut = chosen, COLUMN_CUTS

    class Fp8Row(Fp8Linear, row):  # type: ignore[misc,valid-type]
        facts, cut = chosen, ROW_CUTS

    return Fp8Column, Fp8Row


class Fp8Replicated(Follows, ReplicatedLinear):
    """Every tensor rank holds it whole; ``facts`` are set by subclasses.

    Under sequence parallelism each rank has its own tokens, and what is largest is so over all of them.
    """

    def __init__(self, config: Any, size_in: int, size_out: int, *, tp_group: Any, **named: Any):
        super().__init__(config, size_in, size_out, tp_group=tp_group, **named)
        self.cut = SEQUENCE_CUTS if config.sequence_parallel else frozenset()
        self.scaling = Scaling(self.facts, tp_group, cut=self.cut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [s b k] -> [s b n]
        if not self.scaling.is_on:
            return super().forward(x)
        is_trained = torch.is_grad_enabled()
        return Fp8Product.apply(x, self.weight, self.bias, False, False, None, self.scaling, is_trained)


@lru_cache(maxsize=32)
def fp8_replicated(chosen: Fp8Config) -> type[ReplicatedLinear]:
    class Replicated(Fp8Replicated):
        facts = chosen

    return Replicated


def scalings(module: nn.Module) -> Iterator[Scaling]:
    """Of all linears in ``module`` that follow a recipe, in order."""
    for part in module.modules():
        if isinstance(part, Follows):
            yield part.scaling


def name_linears(module: nn.Module, name: str) -> None:
    """Tell each linear of the layer called ``name`` what the whole model calls it."""
    for path, part in module.named_modules():
        if isinstance(part, Follows):
            part.scaling.name = f"{name}.{path}"
