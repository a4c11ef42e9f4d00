"""T5's positions: a learned bias of the scores for each head and bucket of distances.

Raffel et al. 2020 (arXiv:1910.10683), section 2.1; buckets as in google/mesh, mesh_tensorflow/transformer/
transformer_layers.py (_relative_position_bucket).
"""

import math
from functools import lru_cache

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn


class RelativeBias(nn.Module):
    """One table for a stack: its layers' are tied."""

    def __init__(
        self, num_buckets: int, max_distance: int, num_heads: int, *, is_causal: bool, dtype: torch.dtype
    ):
        super().__init__()
        self._facts = (num_buckets, max_distance, is_causal)
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, dtype=dtype))  # this rank's heads
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)

    def forward(self, sq: int, sk: int) -> torch.Tensor:
        """[1 n sq sk]; the queries are the last ``sq`` of the ``sk`` positions"""
        places = buckets(sq, sk, *self._facts, self.weight.device)
        return self.weight[places].permute(2, 0, 1).unsqueeze(0)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def buckets(
    sq: int, sk: int, num_buckets: int, max_distance: int, is_causal: bool, device: torch.device
) -> torch.Tensor:
    """int64 [sq sk]: the first half of the buckets are single distances, the other half grow like logarithms."""
    distance = torch.arange(sk, device=device)[None] - torch.arange(sk - sq, sk, device=device)[:, None]
    first = torch.zeros_like(distance)
    if is_causal:
        distance = (-distance).clamp_min(0)
    else:
        num_buckets //= 2
        first = (distance > 0) * num_buckets  # keys to the right have buckets of their own
        distance = distance.abs()
    exact = num_buckets // 2
    ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (num_buckets - exact)).long()).clamp_max(num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)
