"""Gradients that each tensor rank holds only a part of, although every rank holds the whole parameter.

Two kinds: parameters fed with a sequence shard (megatron-core marks them ``sequence_parallel``: norms, and
biases added after a row-parallel linear), and the norms of single heads' queries and keys, since a rank
normalises its own heads only. megatron-core sums them in ``finalize_model_grads``, which DeepSpeed never
calls: left alone, a norm is 4% off and the replicas drift apart.  A hook on the leaf runs before the gradient
is accumulated, hence before any reduction of ZeRO.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.attention import SelfAttention
from torch import nn


def partial_gradient_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Each once, in the order of ``module.parameters()``."""
    of_heads = {
        id(parameter)
        for attention in module.modules()
        if isinstance(attention, SelfAttention)
        for norm in (attention.q_layernorm, attention.k_layernorm)
        if norm is not None
        for parameter in norm.parameters()
    }
    return [p for p in module.parameters() if getattr(p, "sequence_parallel", False) or id(p) in of_heads]


def sum_partial_gradients(module: nn.Module, tp_group: Any) -> int:
    """Install the hooks, once per module; returns how many parameters have one."""
    if tp_group.size() == 1:
        return 0

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=tp_group)
        return total

    parameters = partial_gradient_parameters(module)
    for parameter in parameters:
        parameter.register_hook(summed)
    return len(parameters)
