"""Each parameter as it is in the undivided model, and how ranks share it: pure splitting and merging.

The query-key-value projection needs no special case: its rows are grouped by key-value head (queries of the
group, key, value), so a contiguous cut at group boundaries is whole heads.  A gated first linear is [gate;
up] and each rank holds a part of both: stride 2.  Experts lie one behind the other in the first dimension of one
tensor, [experts ...], which ep cuts; what is left of each is cut like a dense parameter, by etp.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from model_providers.layout import TensorPlace


class LogicalParameter(NamedTuple):
    name: str
    shape: tuple[int, ...]  # undivided
    partition_dim: int | None  # None: every tensor rank holds all of it
    stride: int = 1  # how many interleaved parts are cut each on their own
    is_expert: bool = False  # the first dimension counts experts

    @property
    def replicated(self) -> bool:
        return self.partition_dim is None and not self.is_expert


def describe(module: nn.Module, place: TensorPlace) -> dict[str, LogicalParameter]:
    """All parameters of ``module``, by name, from the marks that megatron-core's layers and ours put on them."""
    return {name: describe_parameter(name, parameter, place) for name, parameter in module.named_parameters()}


def describe_parameter(name: str, parameter: torch.Tensor, place: TensorPlace) -> LogicalParameter:
    shape, is_expert = list(parameter.shape), is_routed_expert(parameter)
    if is_expert:
        shape[0] *= place.ep
    if not getattr(parameter, "tensor_model_parallel", False) or parameter.partition_dim < 0:  # type: ignore[attr-defined]
        return LogicalParameter(name, tuple(shape), None, is_expert=is_expert)
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    shape[dim] *= place.etp if is_expert else place.tp
    return LogicalParameter(name, tuple(shape), dim, stride, is_expert)


def is_routed_expert(parameter: torch.Tensor) -> bool:
    """Whether the first dimension counts experts that ep shares out (see experts.py)."""
    return getattr(parameter, "is_routed_expert", False)


def split(full: torch.Tensor, description: LogicalParameter, place: TensorPlace) -> torch.Tensor:
    """This rank's share of the undivided tensor."""
    assert tuple(full.shape) == description.shape, (description.name, tuple(full.shape), description.shape)
    if not description.is_expert:
        return _cut(full, description, place.tp_rank, place.tp)
    return _cut(full.chunk(place.ep)[place.ep_rank], description, place.etp_rank, place.etp)


def merge(shares: Sequence[torch.Tensor], description: LogicalParameter, *, ep: int = 1) -> torch.Tensor:
    """The undivided tensor from all ranks' shares: in the order of tensor ranks, of experts with ep slowest."""
    if not description.is_expert or ep == 1:
        return _join(shares, description)
    etp = len(shares) // ep
    return torch.cat([_join(shares[rank * etp : (rank + 1) * etp], description) for rank in range(ep)])


def _cut(whole: torch.Tensor, description: LogicalParameter, rank: int, size: int) -> torch.Tensor:
    if description.partition_dim is None or size == 1:
        return whole
    parts = whole.chunk(size * description.stride, dim=description.partition_dim)
    return torch.cat(parts[rank::size], dim=description.partition_dim)


def _join(shares: Sequence[torch.Tensor], description: LogicalParameter) -> torch.Tensor:
    if description.partition_dim is None or len(shares) == 1:
        return shares[0]
    dim, stride = description.partition_dim, description.stride
    parts = [share.chunk(stride, dim=dim) for share in shares]
    return torch.cat([part[i] for i in range(stride) for part in parts], dim=dim)
