"""How long one optimizer step takes, part by part, before anything runs.

The busiest pipeline rank computes all micro-batches (`layer_time.py`); what a step takes beyond that is told apart: the
pipeline's bubble, messages between stages, the sums of gradients over the copies of the model, the optimizer, and
copies to a host.  Figures are of one device.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from launch import pipeline_time, state_time
from launch.hardware import Cluster
from launch.links import group
from launch.scenario import Scenario
from launch.software import OURS, Software
from launch.stage_time import by_rank, stages_of
from model_providers.cost import AttentionCount, train_flops_per_token


class Traffic(NamedTuple):
    """Bytes that one device sends in a step."""

    tensor: float
    expert: float
    pipeline: float
    data: float
    host: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of the busiest rank, which add up to the step; bytes that it sends; and what follows."""

    gemm_s: float
    attention_s: float
    memory_bound_s: float
    recompute_s: float
    tensor_parallel_s: float
    expert_parallel_s: float
    bubble_s: float
    transfer_s: float  # between pipeline stages, where nothing hides it
    data_parallel_s: float  # what computing does not hide
    optimizer_s: float
    offload_s: float
    traffic: Traffic
    links: dict[str, str]  # kind of traffic -> none, intra or inter
    scenario: Scenario
    cluster: Cluster

    @property
    def parts(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in PARTS}

    @cached_property
    def total_s(self) -> float:
        return sum(self.parts.values())

    @property
    def bubble_share(self) -> float:
        """Of the pipeline's time, as `megaloom schedule` tells it."""
        busy_s = self.total_s - self.data_parallel_s - self.optimizer_s - self.offload_s
        return self.bubble_s / busy_s

    @property
    def tokens_per_s(self) -> float:
        return self.scenario.tokens_per_step / self.total_s

    @property
    def num_devices(self) -> int:
        return self.scenario.layout.world_size

    def tflops_per_device(self, attention: AttentionCount = "causal") -> float:
        """Model FLOPs, recompute not counted; "full" is the count of papers before 2025 (model_providers/cost.py)."""
        scenario = self.scenario
        each = train_flops_per_token(
            scenario.model, scenario.sequence_length, attention, target_length=scenario.target_length
        )
        return each * self.tokens_per_s / self.num_devices / 1e12

    def mfu(self, attention: AttentionCount = "causal") -> float:
        """Of the dense peak (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        peak = self.cluster.device.peak_flops_per_s(self.scenario.dtype) / 1e12
        return self.tflops_per_device(attention) / peak

    def days(self, num_tokens: float) -> float:
        return num_tokens / self.tokens_per_s / 86400

    def device_hours(self, num_tokens: float) -> float:
        return self.days(num_tokens) * 24 * self.num_devices


PARTS = tuple(field.name for field in fields(StepTime) if field.name.endswith("_s"))


def step_time(
    scenario: Scenario, cluster: Cluster, *, software: Software = OURS, simulated: bool = True
) -> StepTime:
    """The step as predicted; ``simulated=False`` takes closed forms of bubbles, for a search."""
    stages = stages_of(scenario, cluster, software)
    ranks = by_rank(scenario, stages)
    busiest = max(ranks, key=lambda time: time.total_s)
    m = scenario.num_micro_batches
    busy = busiest.forward.plus(busiest.input_gradient).plus(busiest.weight_gradient).times(m)
    again = busiest.recompute.times(m)
    bubble_s, transfer_s = pipeline_time.waiting_s(
        scenario, cluster, stages.times, ranks, software, simulated
    )
    data_s, data_bytes, data_link = state_time.data_parallel(scenario, cluster, stages, busiest, software)
    optimizer_s, offload_s, host_bytes = state_time.update(scenario, cluster, stages)
    return StepTime(
        gemm_s=busy.gemm_s,
        attention_s=busy.attention_s,
        memory_bound_s=busy.memory_s,
        recompute_s=again.gemm_s + again.attention_s + again.memory_s,
        tensor_parallel_s=busy.tensor_s + again.tensor_s,
        expert_parallel_s=busy.expert_s + again.expert_s,
        bubble_s=bubble_s,
        transfer_s=transfer_s,
        data_parallel_s=data_s,
        optimizer_s=optimizer_s,
        offload_s=offload_s,
        traffic=Traffic(
            m * busiest.tensor_bytes,
            m * busiest.expert_bytes,
            pipeline_time.sent_bytes(scenario, software),
            data_bytes,
            host_bytes,
        ),
        links=_links(scenario, cluster, data_link),
        scenario=scenario,
        cluster=cluster,
    )


def _links(scenario: Scenario, cluster: Cluster, data_link: str) -> dict[str, str]:
    layout = scenario.layout
    spans_nodes = layout.world_size > cluster.devices_per_node
    return {
        "tensor": group(cluster, size=layout.tp).link,
        "expert": group(cluster, size=layout.ep * layout.expert_tp).link if layout.ep > 1 else "none",
        "pipeline": "none" if layout.pp == 1 else ("inter" if spans_nodes else "intra"),
        "data": data_link,
    }
