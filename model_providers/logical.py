"""Each parameter as it is in the undivided model, and how tensor ranks share it: pure splitting and merging.

The query-key-value projection needs no special case: its rows are grouped by key-value head (queries of the
group, key, value), so a contiguous cut at group boundaries is whole heads.  A gated first linear is [gate;
up] and each rank holds a part of both: stride 2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


class LogicalParameter(NamedTuple):
    name: str
    shape: tuple[int, ...]  # undivided
    partition_dim: int | None  # None: every tensor rank holds all of it
    stride: int = 1  # how many interleaved parts are cut each on their own

    @property
    def replicated(self) -> bool:
        return self.partition_dim is None


def describe(module: nn.Module, tp: int) -> dict[str, LogicalParameter]:
    """All parameters of ``module``, by name, from the marks that megatron-core's layers put on them."""
    return {name: describe_parameter(name, parameter, tp) for name, parameter in module.named_parameters()}


def describe_parameter(name: str, parameter: torch.Tensor, tp: int) -> LogicalParameter:
    shape = list(parameter.shape)
    if not getattr(parameter, "tensor_model_parallel", False) or parameter.partition_dim < 0:  # type: ignore[attr-defined]
        return LogicalParameter(name, tuple(shape), None)
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    shape[dim] *= tp
    return LogicalParameter(name, tuple(shape), dim, stride)


def split(full: torch.Tensor, description: LogicalParameter, tp_rank: int, tp: int) -> torch.Tensor:
    """This rank's share of the undivided tensor."""
    if description.partition_dim is None or tp == 1:
        return full
    assert tuple(full.shape) == description.shape, (description.name, tuple(full.shape), description.shape)
    parts = full.chunk(tp * description.stride, dim=description.partition_dim)
    return torch.cat(parts[tp_rank::tp], dim=description.partition_dim)


def merge(shards: Sequence[torch.Tensor], description: LogicalParameter) -> torch.Tensor:
    """The undivided tensor from all tensor ranks' shares, in rank order."""
    if description.partition_dim is None or len(shards) == 1:
        return shards[0]
    dim, stride = description.partition_dim, description.stride
    parts = [shard.chunk(stride, dim=dim) for shard in shards]
    return torch.cat([part[i] for i in range(stride) for part in parts], dim=dim)
