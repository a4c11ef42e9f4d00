"""Linears with a product of our own, where megatron-core's does not do.

**Wide**: 16-bit matrices multiplied in fp32, for CPUs without 16-bit matrix instructions.  There torch emulates a bf16
product at a quarter of fp32's speed (measured: 2048 x 256 x 1536 in 57 ms, widened 15 ms).  Nothing is lost: a product
of two bf16 numbers is exact in fp32, and native kernels sum in fp32 too, so results differ by the order of the sums
alone.  What is kept for the backward pass stays 16-bit.

**Waiting**: under `weight_gradients.may_wait`, and always on a CPU, the weight's gradient can be put aside.

On a CPU it always runs: megatron-core's own allocates on CUDA under sequence parallelism, and sums over the tensor
group in gloo's slow way.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from model_providers import weight_gradients
from model_providers.mcore_on_cpu import gather_along_first_dim, reduce, reduce_scatter_along_first_dim

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86, then Arm


def cpu_multiplies_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)


class Product(torch.autograd.Function):
    """[s b h] x [n h] (+ [n]) -> [s b n], with the communication of megatron-core's linear."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # [s b h], under sequence parallelism [s/tp b h]
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sequence_parallel: bool,
        allreduce_dgrad: bool,
        group: Any,
        is_wide: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sequence_parallel, ctx.allreduce_dgrad, ctx.group = sequence_parallel, allreduce_dgrad, group
        ctx.parameter = weight  # the object that has the gradient: what is saved may come back as a copy
        ctx.has_bias, ctx.is_wide = bias is not None, is_wide
        whole = gather_along_first_dim(x, group) if sequence_parallel else x
        output = _wide(whole, is_wide) @ _wide(weight, is_wide).t()
        if bias is not None:
            output += bias
        return output.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wide = _wide(grad, ctx.is_wide)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (wide @ _wide(weight, ctx.is_wide)).to(x.dtype)
            if ctx.sequence_parallel:
                grad_x = reduce_scatter_along_first_dim(grad_x, ctx.group)
            elif ctx.allreduce_dgrad:
                grad_x = reduce(grad_x, ctx.group)
        if ctx.needs_input_grad[1]:
            group = ctx.group if ctx.sequence_parallel else None
            work = partial(weight_gradient, x, grad, group, weight.dtype, is_wide=ctx.is_wide)
            # A hook on a weight that every tensor rank holds sums their parts of its gradient, and does not wait.
            is_part = getattr(ctx.parameter, "sequence_parallel", False)
            store = None if is_part else weight_gradients.open_store()
            if store is None:
                grad_weight = work()
            else:
                store.put(ctx.parameter, work)
        grad_bias = wide.sum(dim=(0, 1)).to(grad.dtype) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


def weight_gradient(
    x: torch.Tensor, grad: torch.Tensor, group: Any, dtype: torch.dtype, *, is_wide: bool
) -> torch.Tensor:
    """[s b h] (or the group's shares of it), [s b n] -> [n h]"""
    whole = x if group is None else gather_along_first_dim(x, group)
    return (_wide(grad, is_wide).flatten(0, 1).t() @ _wide(whole, is_wide).flatten(0, 1)).to(dtype)


def _wide(tensor: torch.Tensor, is_wide: bool) -> torch.Tensor:
    return tensor.float() if is_wide else tensor


class _OwnProduct:
    """Stands before megatron-core's linears in the list of bases; ``widens`` is set by subclasses."""

    widens = False

    def _forward_impl(
        self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        is_wide = self.widens and weight.dtype.itemsize == 2
        if not (is_wide or input.is_cpu or weight_gradients.can_wait()):
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        return _product(input, weight, is_wide=is_wide, **kwargs)


class ColumnLinear(_OwnProduct, ColumnParallelLinear):
    pass


class RowLinear(_OwnProduct, RowParallelLinear):
    pass


class WideColumnLinear(ColumnLinear):
    widens = True


class WideRowLinear(RowLinear):
    widens = True


def _product(
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    is_wide: bool,
    bias: torch.Tensor | None,
    sequence_parallel: bool,
    allreduce_dgrad: bool,
    tp_group: Any,
    **unused: Any,
) -> torch.Tensor:
    return Product.apply(input, weight, bias, sequence_parallel, allreduce_dgrad, tp_group, is_wide)


class ReplicatedLinear(nn.Module):
    """A linear that every tensor rank holds whole; under sequence parallelism each feeds it its own tokens.

    ``sees_all``: each rank feeds it all tokens even then, so that its gradients are whole.  ``tp_group``: for
    those that agree on more than sums.
    """

    def __init__(
        self,
        config: Any,
        size_in: int,
        size_out: int,
        *,
        bias: bool = False,
        sees_all: bool = False,
        tp_group: Any = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(size_out, dtype=config.params_dtype)) if bias else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel and not sees_all  # type: ignore[attr-defined]
        self._is_wide = config.params_dtype.itemsize == 2 and not cpu_multiplies_bf16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [s b k] -> [s b n]
        return Product.apply(x, self.weight, self.bias, False, False, None, self._is_wide and x.is_cpu)
