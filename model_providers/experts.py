"""The experts of a layer in one tensor for each matrix, and their products: megatron-core's seam, our arithmetic.

megatron-core's grouped experts need Transformer Engine or a package for CUDA; its sequential ones are a module each,
thousands in a large model.  Here the experts of a rank lie one behind the other, [experts out in].  Tokens come sorted
by expert; on CUDA one grouped product takes them all, on a CPU each expert's rows are a product of their own.
Gradients of weights can wait for a pipeline's idle moments, as those of our linears do.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import nn

from model_providers import weight_gradients
from model_providers.fused import WeightedGatedSiLU
from model_providers.linears import cpu_multiplies_bf16
from model_providers.portable import GatedActivation

ALIGNMENT_BYTES = 16  # of a row, which torch's grouped product on CUDA asks for


class ExpertProduct(torch.autograd.Function):
    """[t k] sorted by expert x [e n k] -> [t n]; expert i takes the next ``counts[i]`` rows."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: Sequence[int], is_wide: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter = weight  # the object that has the gradient: what is saved may come back as a copy
        ctx.counts, ctx.is_wide = counts, is_wide
        return multiply(x, weight.transpose(1, 2), counts, is_wide=is_wide)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = multiply(grad, weight, ctx.counts, is_wide=ctx.is_wide)
        if ctx.needs_input_grad[1]:
            work = partial(weight_gradient, x, grad, ctx.counts, weight, is_wide=ctx.is_wide)
            store = weight_gradients.open_store()
            if store is None:
                grad_weight = work()
            else:
                store.put(ctx.parameter, work)
        return grad_x, grad_weight, None, None


def multiply(
    x: torch.Tensor, matrices: torch.Tensor, counts: Sequence[int], *, is_wide: bool
) -> torch.Tensor:
    """[t k] x [e k n] -> [t n]"""
    if _has_grouped_kernel(x, matrices):
        return F.grouped_mm(x, matrices, offs=_ends(counts, x.device))
    out = x.new_empty(x.size(0), matrices.size(2))
    for rows, part, matrix in zip(x.split(counts), out.split(counts), matrices, strict=True):
        if is_wide:
            part.copy_(rows.float() @ matrix.float())
        else:
            torch.mm(rows, matrix, out=part)
    return out


def weight_gradient(
    x: torch.Tensor, grad: torch.Tensor, counts: Sequence[int], weight: torch.Tensor, *, is_wide: bool
) -> torch.Tensor:
    """[t k], [t n] -> [e n k]; zero for an expert without tokens"""
    if _has_grouped_kernel(x, weight):
        return F.grouped_mm(grad.t(), x, offs=_ends(counts, x.device))
    out = torch.empty_like(weight)
    for rows, gradients, part in zip(x.split(counts), grad.split(counts), out, strict=True):
        if is_wide:
            part.copy_(gradients.t().float() @ rows.float())
        else:
            torch.mm(gradients.t(), rows, out=part)
    return out


def _has_grouped_kernel(x: torch.Tensor, matrices: torch.Tensor) -> bool:
    aligned = all(size * x.itemsize % ALIGNMENT_BYTES == 0 for size in matrices.shape[1:])
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned


def _ends(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


class ExpertLinear(nn.Module):
    """One matrix of all experts of a rank: weight [e n k], marked for the layout and for gradients' sums.

    ``cut``: the axis that the expert tensor group shares out; ``groups``: for those that agree on more than sums.
    """

    def __init__(
        self,
        config: Any,
        num_experts: int,
        size_out: int,
        size_in: int,
        *,
        cut: int,
        stride: int,
        groups: Any = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, size_out, size_in, dtype=config.params_dtype))
        mark_expert(self.weight, cut=cut, stride=stride, is_shared_out=config.expert_model_parallel_size > 1)
        self._is_wide = config.params_dtype.itemsize == 2 and not cpu_multiplies_bf16()

    def forward(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """[t k] -> [t n]"""
        return ExpertProduct.apply(x, self.weight, counts, self._is_wide and x.is_cpu)


def mark_expert(weight: Any, *, cut: int, stride: int, is_shared_out: bool) -> None:
    """For the layout (logical.py), and for whoever sums gradients."""
    weight.is_routed_expert = weight.tensor_model_parallel = True
    weight.partition_dim, weight.partition_stride = cut, stride
    weight.allreduce = (
        not is_shared_out
    )  # megatron-core's and DeepSpeed's word: summed over dp like all others


class GroupedExperts(MegatronModule):
    """The experts of this rank, each cut over the expert tensor group: gate and up (or up alone), then down.

    What comes out is this rank's part of a sum over that group, which the dispatcher takes.
    """

    linear: ClassVar[type[ExpertLinear]] = ExpertLinear

    def __init__(
        self, num_local_experts: int, config: Any, submodules: Any = None, pg_collection: Any = None
    ):
        super().__init__(config=config)
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        parts = 2 if config.gated_linear_unit else 1
        up, down = (parts * width, config.hidden_size), (config.hidden_size, width)
        named = {"groups": pg_collection}
        self.linear_fc1 = self.linear(config, num_local_experts, *up, cut=1, stride=parts, **named)
        self.linear_fc2 = self.linear(config, num_local_experts, *down, cut=2, stride=1, **named)
        self._is_gated_silu = config.gated_linear_unit and config.activation_func is F.silu
        self._activation = GatedActivation(config) if config.gated_linear_unit else config.activation_func
        self._forgets = config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules

    def forward(
        self,
        tokens: torch.Tensor,  # [t h], sorted by expert
        tokens_per_expert: torch.Tensor,  # int64 [e], on the CPU
        probs: torch.Tensor,  # [t], the router's weight of each
    ) -> tuple[torch.Tensor, None]:
        counts = tokens_per_expert.tolist()
        wide = self.linear_fc1(tokens, counts)  # [t f], gated [t 2f]
        if not self._forgets:
            return self.linear_fc2(self._weighted(wide, probs), counts), None
        again = tensor_parallel.CheckpointWithoutOutput()
        output = self.linear_fc2(again.checkpoint(self._weighted, wide, probs), counts)
        again.discard_output_and_register_recompute(output)
        return output, None

    def _weighted(self, x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        if self._is_gated_silu:
            return WeightedGatedSiLU.apply(x, probs)
        return (self._activation(x) * probs.unsqueeze(-1)).to(x.dtype)
