"""RMSNorm, gated SiLU, and the split of a projection into rotated heads, in fewer passes over memory.

Eager torch pays for every pass over an activation.  Measured on the CPU at 2048 tokens x 256 in fp32 with two
threads: F.rms_norm forward and backward 4.3 ms, RMSNorm here 1.3.  Gradients are exact: the tests compare
them in float64.  Large gated SiLUs and splits on CUDA are one kernel of torch.compile each, which rounds once, where
eager torch rounds each pass.
"""

from typing import Any

import torch
import torch.nn.functional as F

from model_providers.compiled import compiled_on_cuda
from model_providers.rotary import turn, turned


class RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * w over the last dimension, in fp32 inside (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)  # [... 1]
        inverse = length.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """With n = x / rms(x): dw = sum(g n), dx = (g w - n mean(g w n)) / rms(x)"""
        x, weight, inverse = ctx.saved_tensors
        width = x.size(-1)
        normal = x * inverse
        product = (grad * normal).reshape(-1, width)
        grad_weight = product.sum(dim=0).to(weight.dtype)
        mean = torch.mv(product, weight.to(product.dtype)).view(inverse.shape).div_(-width)
        grad_x = normal.mul_(mean).addcmul_(grad, weight).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None


class GatedSiLU(torch.autograd.Function):
    """[... 2f] -> [... f]: silu(first half) x second half, keeping only the input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _gated(x.detach())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        if _gated_gradient.pays(x):
            return _gated_gradient(x.detach(), grad)
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=grad_up)
        grad_up.mul_(grad)
        return grad_x


@compiled_on_cuda
def _gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@compiled_on_cuda
def _gated_gradient(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad), dim=-1)


class WeightedGatedSiLU(torch.autograd.Function):
    """[t 2f] x [t] -> [t f]: gated SiLU times each token's weight, which an expert's share of the output is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weight.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        active = F.silu(gate)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.mul(grad, active, out=grad_up)
        grad_weight = torch.linalg.vecdot(grad_up.to(weight.dtype), up.to(weight.dtype))
        column = weight.unsqueeze(-1).to(grad.dtype)
        grad_up.mul_(column)
        torch.ops.aten.silu_backward.grad_input((grad * up).mul_(column), gate, grad_input=grad_gate)
        return grad_x, grad_weight


class SplitHeads(torch.autograd.Function):
    """[s b g (r+2) d] -> query [s b g*r d], key and value [s b g d], query and key rotated.

    All three lie in memory as [b n s d], which SDPA's CPU kernel reads a fifth faster than slices of the
    projection; the gradient is written straight into the projection's layout.
    """

    @staticmethod
    def forward(
        ctx: Any, joined: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.cos, ctx.sin = cos, sin
        if _split.pays(joined):
            return _split(joined.detach(), cos, sin)
        s, b, g, parts, d = joined.shape
        r = parts - 2
        query, key, value = (joined.new_empty(b, g * n, s, d).permute(2, 0, 1, 3) for n in (r, 1, 1))
        turn(joined[..., :r, :], query.unflatten(2, (g, r)), cos, sin)
        turn(joined[..., r : r + 1, :], key.unsqueeze(3), cos, sin)
        value.copy_(joined[..., r + 1, :])
        return query, key, value

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        back = None if ctx.sin is None else -ctx.sin
        if _joined.pays(grad_query):
            return _joined(grad_query, grad_key, grad_value, ctx.cos, back), None, None
        s, b, g, d = grad_key.shape
        r = grad_query.size(2) // g
        joined = grad_key.new_empty(s, b, g, r + 2, d)
        turn(grad_query.unflatten(2, (g, r)), joined[..., :r, :], ctx.cos, back)
        turn(grad_key.unsqueeze(3), joined[..., r : r + 1, :], ctx.cos, back)
        joined[..., r + 1, :] = grad_value
        return joined, None, None


@compiled_on_cuda
def _split(
    joined: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = joined.split((joined.size(3) - 2, 1, 1), dim=3)
    parts = (turned(query, cos, sin), turned(key, cos, sin), value)
    query, key, value = (x.flatten(2, 3).permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for x in parts)
    return query, key, value


@compiled_on_cuda
def _joined(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> torch.Tensor:
    key, value = key.unsqueeze(3), value.unsqueeze(3)
    query = query.unflatten(2, (key.size(2), -1))
    return torch.cat((turned(query, cos, sin), turned(key, cos, sin), value), dim=3)
