"""Linears that multiply 16-bit matrices in fp32, for CPUs without 16-bit matrix instructions.

There torch emulates a bf16 product at a quarter of fp32's speed (measured: 2048 x 256 x 1536 in 57 ms, widened 15 ms).
Nothing is lost: the product of two bf16 numbers is exact in fp32, and native kernels sum in fp32 too, so results
differ by the order of the sums alone.  What is kept for the backward pass stays 16-bit.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from model_providers.mcore_on_cpu import gather_along_first_dim, reduce, reduce_scatter_along_first_dim

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86, then Arm


def cpu_multiplies_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)


class WidenedLinear(torch.autograd.Function):
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
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sequence_parallel, ctx.allreduce_dgrad, ctx.group = sequence_parallel, allreduce_dgrad, group
        ctx.has_bias = bias is not None
        whole = gather_along_first_dim(x, group) if sequence_parallel else x
        output = whole.float() @ weight.float().t()
        if bias is not None:
            output += bias
        return output.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wide = grad.float()
        grad_x = (wide @ weight.float()).to(x.dtype)
        whole = x
        if ctx.sequence_parallel:
            grad_x = reduce_scatter_along_first_dim(grad_x, ctx.group)
            whole = gather_along_first_dim(x, ctx.group)
        elif ctx.allreduce_dgrad:
            grad_x = reduce(grad_x, ctx.group)
        grad_weight = wide.flatten(0, 1).t() @ whole.float().flatten(0, 1)
        grad_bias = wide.sum(dim=(0, 1)).to(grad.dtype) if ctx.has_bias else None
        return grad_x, grad_weight.to(weight.dtype), grad_bias, None, None, None


class _Widened:
    """For subclasses of megatron-core's linears, before them."""

    def _forward_impl(
        self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if weight.dtype.itemsize != 2:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        return _widened(input, weight, **kwargs)


class WidenedColumnLinear(_Widened, ColumnParallelLinear):
    pass


class WidenedRowLinear(_Widened, RowParallelLinear):
    pass


def _widened(
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    sequence_parallel: bool,
    allreduce_dgrad: bool,
    tp_group: Any,
    **unused: Any,
) -> torch.Tensor:
    return WidenedLinear.apply(input, weight, bias, sequence_parallel, allreduce_dgrad, tp_group)
