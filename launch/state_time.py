"""What moves weights, gradients and optimizer states: sums over copies of the model, the optimizer, a host's memory."""

from typing import NamedTuple

from launch.hardware import Cluster
from launch.links import Group, group
from launch.phases import LayerTime
from launch.product_time import BYTES, KERNEL_S, MEMORY_SHARE
from launch.scenario import Scenario
from launch.software import Software
from launch.stage_time import Stages

# Adam in fp32: gradient, master weight and two moments are read, three of them written, and the weight in 16 bit
# (16 + 12 + 2 bytes); the norm reads gradients once more, and they are set to zero (4 + 4).
OPTIMIZER_BYTES = 38
# An optimizer on the host: gradients go down in fp32 and weights come back in 16 bit; its memory moves 28 bytes a
# parameter, at about a device's share of two sockets with eight channels of DDR4 each.
HOST_COPY_BYTES = {"down": 4, "up": 2}
HOST_OPTIMIZER_BYTES = 28
HOST_MEMORY_BYTES_PER_S = 25e9
NVME_OPTIMIZER_BYTES = 12  # master weight and moments, read and written again
# What overlap leaves over: the first bucket of gradients has nothing before it, the last nothing behind it.
NEVER_HIDDEN = 0.1


class _Copies(NamedTuple):
    """Who holds the same parameters, and how many parameters that are."""

    ranks: Group
    parameters: float


def _copies(scenario: Scenario, cluster: Cluster, stages: Stages) -> list[_Copies]:
    """Of dense parameters and of experts, on the rank that holds most."""
    layout, placement = scenario.layout, scenario.placement
    dense, experts = [0.0] * layout.pp, [0.0] * layout.pp
    for virtual in range(placement.total):
        dense[placement.rank(virtual)] += stages.dense[virtual]
        experts[placement.rank(virtual)] += stages.experts[virtual]
    fullest = max(range(layout.pp), key=lambda rank: dense[rank] + experts[rank])
    plain = group(cluster, size=layout.dp, stride=layout.tp)
    expert = group(cluster, size=max(1, layout.expert_dp), stride=layout.expert_tp * layout.ep)
    return [_Copies(plain, dense[fullest]), _Copies(expert, experts[fullest])]


def data_parallel(
    scenario: Scenario, cluster: Cluster, stages: Stages, busiest: LayerTime, software: Software
) -> tuple[float, float, str]:
    """Seconds that computing does not hide, bytes sent, and the slowest link."""
    copies = [each for each in _copies(scenario, cluster, stages) if each.parameters]
    layers = max(1, sum(stages.num_layers) // scenario.layout.pp)
    m, stage = scenario.num_micro_batches, scenario.zero_stage
    weight, gradient = BYTES[scenario.dtype], BYTES[scenario.gradient_dtype]
    gathers_s = gradients_s = sent_bytes = 0.0
    times = m if stage >= 2 else 1  # ZeRO-2 and 3 sum gradients after every micro-batch
    pieces = software.gathers_per_layer * layers if stage == 3 else 1
    for ranks, parameters in copies:
        one_gather = ranks.gather_s(weight * parameters, messages=pieces)
        if stage == 0:
            gradients_s += ranks.all_reduce_s(gradient * parameters)
            sent_bytes += 2 * ranks.gather_bytes(gradient * parameters)
            continue
        again = software.regathers and scenario.recompute == "full"
        num_gathers = m * (3 if again else 2) if stage == 3 else 1  # ZeRO-3 gathers for each pass
        if software.copies_pieces and stage == 3:
            one_gather += pieces * ranks.size * KERNEL_S
        gathers_s += num_gathers * one_gather
        gradients_s += times * ranks.gather_s(gradient * parameters, messages=pieces)
        sent_bytes += num_gathers * ranks.gather_bytes(weight * parameters)
        sent_bytes += times * ranks.gather_bytes(gradient * parameters)
    exposed_s = _exposed(scenario, busiest, gathers_s, gradients_s, software)
    link = max((each.ranks.link for each in copies), key=("none", "intra", "inter").index, default="none")
    return exposed_s, sent_bytes, link


def _exposed(
    scenario: Scenario, busiest: LayerTime, gathers_s: float, gradients_s: float, software: Software
) -> float:
    stage, m = scenario.zero_stage, scenario.num_micro_batches
    if stage == 3:
        hiding_s = m * busiest.total_s if software.overlaps_gathers else 0.0
        return _left_over(gathers_s + gradients_s, hiding_s)
    if stage == 2:
        return gathers_s + _left_over(gradients_s, m * busiest.backward_s)
    if not software.overlaps_gradients:
        return gathers_s + gradients_s
    return _left_over(gradients_s, busiest.backward_s) + _left_over(gathers_s, busiest.forward.total_s)


def _left_over(talking_s: float, hiding_s: float) -> float:
    if hiding_s == 0:
        return talking_s
    return max(NEVER_HIDDEN * talking_s, talking_s - hiding_s)


def update(scenario: Scenario, cluster: Cluster, stages: Stages) -> tuple[float, float, float]:
    """The optimizer on the device, or copies to the host and the optimizer there; and the bytes of those copies."""
    shard = 0.0
    whole = 0.0
    for ranks, parameters in _copies(scenario, cluster, stages):
        shard += parameters / (ranks.size if scenario.zero_stage >= 1 else 1)
        whole += parameters
    device_s = shard * OPTIMIZER_BYTES / (cluster.device.memory_bytes_per_s * MEMORY_SHARE)
    offload_s = host_bytes = 0.0
    if scenario.offload_optimizer != "none":
        there = scenario.offload_ratio * shard
        device_s *= 1 - scenario.offload_ratio
        copied = there * sum(HOST_COPY_BYTES.values())
        host_bytes += copied
        offload_s += copied / cluster.host_bytes_per_s
        offload_s += there * HOST_OPTIMIZER_BYTES / HOST_MEMORY_BYTES_PER_S
    if scenario.offload_optimizer == "nvme":
        offload_s += 2 * shard * NVME_OPTIMIZER_BYTES / cluster.nvme_bytes_per_s
    if scenario.offload_parameters != "none":  # each pass of each micro-batch fetches the rank's shard
        copied = 2 * scenario.num_micro_batches * shard * BYTES[scenario.dtype]
        host_bytes += copied
        slowest = (
            cluster.host_bytes_per_s
            if scenario.offload_parameters == "cpu"
            else min(cluster.host_bytes_per_s, cluster.nvme_bytes_per_s)
        )
        offload_s += copied / slowest
    return device_s, offload_s, host_bytes
