"""A micro-batch's time on each pipeline stage, and the parameters that a rank of it holds.

A search asks this of thousands of layouts, so layers of one kind are timed once and stages of one composition added up
once.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from launch.hardware import Cluster
from launch.layer_time import LayerClock, is_timed_by_flops, layer_times
from launch.phases import LayerTime
from launch.scenario import Scenario
from launch.software import Software
from model_providers.config import ModelConfig
from model_providers.cost import LayerCost, layer_costs
from model_providers.tensor_shares import fp8_places


class Stages(NamedTuple):
    """Of each virtual stage: one micro-batch's time, and the parameters that one rank holds, dense and of experts."""

    times: tuple[LayerTime, ...]
    dense: tuple[float, ...]
    experts: tuple[float, ...]
    num_layers: tuple[int, ...]


def stages_of(scenario: Scenario, cluster: Cluster, software: Software) -> Stages:
    """Layers of one kind are timed once, and stages of one composition added up once."""
    layers = _cached_layer_times(_what_a_layer_knows(scenario), cluster, software)
    costs = _cached_costs(scenario.model, scenario.sequence_length, scenario.target_length)
    clock, layout = LayerClock(scenario, cluster), scenario.layout
    bounds = scenario.stage_bounds
    known: dict[tuple[object, ...], LayerTime] = {}
    times, dense, experts, narrow = [], [], [], []
    has_fp8 = scenario.fp8 is not None and not is_timed_by_flops(scenario.model)
    places = set(fp8_places(scenario.model, scenario.fp8)) if has_fp8 else set()
    for start, end in pairwise(bounds):
        routed = sum(cost.expert_parameters for cost in costs[start:end])
        dense.append((sum(cost.parameters for cost in costs[start:end]) - routed) / layout.tp)
        experts.append(routed / (layout.ep * layout.expert_tp))
        counts = Counter(map(id, layers[start:end]))
        in_fp8 = (cost for place, cost in enumerate(costs[start:end], start) if place in places)
        narrow.append(sum(cost.parameters - cost.expert_parameters for cost in in_fp8) / layout.tp)
        key = (*sorted(counts.items()), dense[-1] + experts[-1])
        if key not in known:
            time = _added_up(layers[start:end], counts)
            if scenario.num_micro_batches > 1:
                time = time.plus(clock.accumulating(dense[-1] + experts[-1]))
            if narrow[-1]:
                time = time.plus(clock.quantising(narrow[-1]))
            known[key] = time
        times.append(known[key])
    return Stages(tuple(times), tuple(dense), tuple(experts), tuple(b - a for a, b in pairwise(bounds)))


def _added_up(layers: Sequence[LayerTime], counts: Mapping[int, int]) -> LayerTime:
    by_id = {id(layer): layer for layer in layers}
    total = LayerTime()
    for each, count in counts.items():
        total = total.plus(by_id[each], count)
    return total


def _what_a_layer_knows(scenario: Scenario) -> Scenario:
    """The scenario without what no single layer feels, so that a search times each kind of layer once."""
    layout = scenario.layout
    within = layout.model_copy(
        update={"pp": 1, "dp": 1, "chunks": 1, "placement": "loop", "etp": layout.expert_tp}
    )
    return Scenario(
        model=scenario.model,
        layout=within,
        sequence_length=scenario.sequence_length,
        micro_size=scenario.micro_size,
        dtype=scenario.dtype,
        recompute=scenario.recompute,
        recompute_modules=scenario.recompute_modules,
        chunk_tokens=scenario.chunk_tokens,
        target_length=scenario.target_length,
        fused=scenario.fused,
        fp8=scenario.fp8,
    )


@lru_cache(maxsize=4096)
def _cached_layer_times(scenario: Scenario, cluster: Cluster, software: Software) -> list[LayerTime]:
    device = cluster.device
    device = replace(device, attention_share=device.attention_share * software.attention_rate)
    layers = layer_times(scenario, cluster.with_(device=device))
    exposed = {id(layer): layer.with_tensor_share(1 - software.hidden_tensor_share) for layer in layers}
    return [exposed[id(layer)] for layer in layers]


@lru_cache(maxsize=256)
def _cached_costs(model: ModelConfig, sequence_length: int, target_length: int | None) -> list[LayerCost]:
    return layer_costs(model, sequence_length, target_length=target_length)


def by_rank(scenario: Scenario, stages: Stages) -> list[LayerTime]:
    placement = scenario.placement
    if placement.chunks == 1:
        return list(stages.times)
    ranks: list[Counter[LayerTime]] = [Counter() for _ in range(placement.stages)]
    for virtual, time in enumerate(stages.times):
        ranks[placement.rank(virtual)][time] += 1
    known: dict[frozenset[tuple[LayerTime, int]], LayerTime] = {}
    for chunks in ranks:
        key = frozenset(chunks.items())
        if key not in known:
            total = LayerTime()
            for time, count in chunks.items():
                total = total.plus(time, count)
            known[key] = total
    return [known[frozenset(chunks.items())] for chunks in ranks]
