"""Whether a layout fits: states by ZeRO's stage, and the activations that a schedule keeps."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from launch.hardware import Cluster
from launch.layer_time import BYTES
from launch.scenario import Scenario
from launch.stage_time import stage_bounds
from model_providers.activation_memory import RecomputeMode
from model_providers.config import ModelConfig
from model_providers.cost import layer_costs, state_bytes_per_parameter
from pretrain.engine.schedules.catalogue import SCHEDULES

# CUDA's context, NCCL's buffers and what an allocator cannot hand out again.
RESERVED_BYTES = 3e9
FRAGMENTED_SHARE = 0.05


class Memory(NamedTuple):
    """Bytes on the fullest device, and how many it has for them."""

    states_bytes: float
    activation_bytes: float
    limit_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.states_bytes + self.activation_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.limit_bytes


def fits(scenario: Scenario, cluster: Cluster) -> Memory:
    """States by ZeRO's stage, and the activations that a schedule keeps; on the rank that needs most."""
    states, kept = _bytes_by_rank(scenario)
    worst = max(range(len(states)), key=lambda rank: states[rank] + kept[rank])
    limit = cluster.device.memory_bytes * (1 - FRAGMENTED_SHARE) - RESERVED_BYTES
    return Memory(states[worst], kept[worst], max(limit, cluster.device.memory_bytes / 2))


def _bytes_by_rank(scenario: Scenario) -> tuple[list[float], list[float]]:
    layout, placement = scenario.layout, scenario.placement
    sums = _sums_of(scenario, scenario.recompute)
    tokens = scenario.micro_size * scenario.sequence_length
    # With full recompute, one layer's activations while it is computed again.
    again = _sums_of(scenario, "none").largest_bytes * tokens if scenario.recompute == "full" else 0.0
    states, kept = [0.0] * layout.pp, [again] * layout.pp
    plain_bytes = _state_bytes(scenario, layout.dp) / layout.tp
    expert_bytes = _state_bytes(scenario, max(1, layout.expert_dp)) / (layout.ep * layout.expert_tp)
    for virtual, (start, end) in enumerate(pairwise(stage_bounds(scenario))):
        rank = placement.rank(virtual)
        routed = sums.experts[end] - sums.experts[start]
        dense = sums.parameters[end] - sums.parameters[start] - routed
        states[rank] += dense * plain_bytes + routed * expert_bytes
        kept[rank] += (
            (sums.bytes_per_token[end] - sums.bytes_per_token[start]) * tokens * _live(scenario, rank)
        )
    return states, kept


class _Sums(NamedTuple):
    """Of the first n layers, for each n."""

    parameters: list[float]
    experts: list[float]
    bytes_per_token: list[float]
    largest_bytes: float  # for a token, of any layer between the first and the last


def _sums_of(scenario: Scenario, recompute: RecomputeMode) -> _Sums:
    layout = scenario.layout
    return _cached_sums(
        scenario.model,
        scenario.sequence_length,
        scenario.target_length,
        recompute,
        _Split(layout.tp, layout.expert_tp, layout.shards_sequence),
        BYTES[scenario.dtype],
        scenario.fused,
    )


@dataclass(frozen=True)
class _Split:
    tp: int
    etp: int
    sequence_parallel: bool


@lru_cache(maxsize=1024)
def _cached_sums(
    model: ModelConfig,
    sequence_length: int,
    target_length: int | None,
    recompute: RecomputeMode,
    split: _Split,
    bytes_per_value: int,
    fused: bool,
) -> _Sums:
    costs = layer_costs(
        model,
        sequence_length,
        target_length=target_length,
        recompute=recompute,
        tp=split.tp,
        etp=split.etp,
        sequence_parallel=split.sequence_parallel,
        bytes_per_value=bytes_per_value,
        fused=fused,
    )
    return _Sums(
        [0, *accumulate(cost.parameters for cost in costs)],
        [0, *accumulate(cost.expert_parameters for cost in costs)],
        [0, *accumulate(cost.activation_bytes_per_token for cost in costs)],
        max(cost.activation_bytes_per_token for cost in costs[1:-1]),
    )


def _state_bytes(scenario: Scenario, copies: int) -> float:
    """Of one parameter: weight, gradient, optimizer (Rajbhandari et al. 2020, arXiv:1910.02054, section 5)."""
    each = state_bytes_per_parameter(scenario.dtype, gradient_dtype=scenario.gradient_dtype)
    stage = scenario.zero_stage
    optimizer = (
        0.0 if scenario.offload_optimizer != "none" else each.optimizer / (copies if stage >= 1 else 1)
    )
    gradients = each.gradients / (copies if stage >= 2 else 1)
    weights = 0.0 if scenario.offload_parameters != "none" else each.weights / (copies if stage == 3 else 1)
    return weights + gradients + optimizer


def _live(scenario: Scenario, rank: int) -> float:
    """Micro-batches whose activations a chunk of this rank keeps at once, at most."""
    pp, m, chunks = scenario.layout.pp, scenario.num_micro_batches, scenario.layout.chunks
    if scenario.schedule == "eager":
        return min(m, 2 * (pp - rank) - 1)
    if SCHEDULES[scenario.schedule].chunks == "many":  # Narayanan et al. 2021, section 2.2.2
        return min(m, pp + (2 * (pp - rank - 1) + 1 - pp) / chunks)
    if scenario.schedule == "zb-v":
        return min(m, pp)
    return min(m, pp - rank)
