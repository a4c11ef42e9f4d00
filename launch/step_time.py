"""How long one optimizer step takes, part by part, before anything runs.

The busiest pipeline rank computes all micro-batches (`layer_time.py`); what a step takes beyond that is told apart: the
pipeline's bubble, messages between stages, the sums of gradients over the copies of the model, the optimizer, and
copies to a host.  Figures are of one device.  Software differs in what it hides behind computing and in how it
gathers weights; that is stated once for each (`Software`), never for a run.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

from launch.hardware import Cluster
from launch.layer_time import BYTES, KERNEL_S, MEMORY_SHARE, LayerClock, LayerTime, layer_times
from launch.links import Group, group, message_s
from launch.scenario import Scenario
from model_providers.config import ModelConfig
from model_providers.cost import AttentionCount, LayerCost, layer_costs, train_flops_per_token
from pretrain.engine.schedules.catalogue import make_schedule
from pretrain.engine.schedules.simulate import Times, simulate

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
MOST_SIMULATED_OPS = 60_000  # of a schedule; above that the closed form


@dataclass(frozen=True)
class Software:
    """What an engine hides behind computing, and how it moves weights."""

    name: str
    gathers_per_layer: int  # collectives for a layer's weights under ZeRO-3
    overlaps_gathers: bool  # ZeRO-3's, with the layers before
    overlaps_gradients: bool  # of ZeRO 0 and 1, with the last micro-batch's backward pass
    hides_transfers: bool  # between stages, wherever a schedule leaves room
    scatters_transfers: bool  # each tensor rank sends its share alone, even without sequence parallelism
    copies_pieces: bool = False  # ZeRO-3's collectives copy each rank's piece by a kernel of its own
    regathers: bool = True  # ZeRO-3 gathers once more where a layer is computed again
    attention_rate: float = 1.0  # of its fused attention, over the device's `attention_share`
    hidden_tensor_share: float = (
        0.0  # of the tensor group's collectives, behind the products before and after them
    )


# DeepSpeed fetches module by module: four matrices of a block, since small parameters stay; each forward hook fetches,
# that of a recomputation too.
OURS = Software("Megaloom", 4, True, False, True, False)
# Narayanan et al. 2021, section 4.1 for scattered messages; nothing overlaps (Korthikanti et al. 2022, section 6).
MEGATRON_2021 = Software("Megatron-LM 2021", 4, False, False, False, True)
MEGATRON_CORE = Software("Megatron Core", 4, True, True, True, True)
# With --tp-comm-overlap; products are cut into as many pieces as there are ranks, mostly 4 or 8: one is not hidden.
MEGATRON_OVERLAPPED = replace(MEGATRON_CORE, name="Megatron Core overlapped", hidden_tensor_share=0.75)
# As it was in 2021: ZeRO-3 gathered each of a block's 12 tensors by itself, into a list of tensors, and hid nothing;
# nor did its pipeline.
DEEPSPEED_2021 = Software("DeepSpeed 2021", 12, False, False, False, False, copies_pieces=True)
FSDP = Software("PyTorch FSDP", 1, True, True, True, False, regathers=False)  # a block is one flat parameter
# FlashAttention in Triton; FlashAttention 2 is 1.3 to 1.5 times as fast in forward passes and twice in backward passes
# (Dao 2023, arXiv:2307.08691, section 4.1).
FSDP_TRITON = replace(FSDP, name="PyTorch FSDP, Triton attention", attention_rate=0.6)


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


class Stages(NamedTuple):
    """Of each virtual stage: one micro-batch's time, and the parameters that one rank holds, dense and of experts."""

    times: tuple[LayerTime, ...]
    dense: tuple[float, ...]
    experts: tuple[float, ...]
    num_layers: tuple[int, ...]


def step_time(
    scenario: Scenario, cluster: Cluster, *, software: Software = OURS, simulated: bool = True
) -> StepTime:
    """The step as predicted; ``simulated=False`` takes closed forms of bubbles, for a search."""
    stages = _stages(scenario, cluster, software)
    by_rank = _by_rank(scenario, stages)
    busiest = max(by_rank, key=lambda time: time.total_s)
    m = scenario.num_micro_batches
    busy = busiest.forward.plus(busiest.input_gradient).plus(busiest.weight_gradient).times(m)
    again = busiest.recompute.times(m)
    bubble_s, transfer_s = _pipeline(scenario, cluster, stages.times, by_rank, software, simulated)
    data_s, data_bytes, data_link = _data_parallel(scenario, cluster, stages, busiest, software)
    optimizer_s, offload_s, host_bytes = _update(scenario, cluster, stages)
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
            _sent_between_stages(scenario, software),
            data_bytes,
            host_bytes,
        ),
        links=_links(scenario, cluster, data_link),
        scenario=scenario,
        cluster=cluster,
    )


def _stages(scenario: Scenario, cluster: Cluster, software: Software) -> Stages:
    """Layers of one kind are timed once, and stages of one composition added up once."""
    layers = _cached_layer_times(_what_a_layer_knows(scenario), cluster, software)
    costs = _cached_costs(scenario.model, scenario.sequence_length, scenario.target_length)
    clock, layout = LayerClock(scenario, cluster), scenario.layout
    bounds = stage_bounds(scenario)
    known: dict[tuple[object, ...], LayerTime] = {}
    times, dense, experts = [], [], []
    for start, end in pairwise(bounds):
        routed = sum(cost.expert_parameters for cost in costs[start:end])
        dense.append((sum(cost.parameters for cost in costs[start:end]) - routed) / layout.tp)
        experts.append(routed / (layout.ep * layout.expert_tp))
        counts = Counter(map(id, layers[start:end]))
        key = (*sorted(counts.items()), dense[-1] + experts[-1])
        if key not in known:
            time = _added_up(layers[start:end], counts)
            if scenario.num_micro_batches > 1:
                time = time.plus(clock.accumulating(dense[-1] + experts[-1]))
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
        target_length=scenario.target_length,
        fused=scenario.fused,
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


def stage_bounds(scenario: Scenario) -> tuple[int, ...]:
    """`Scenario.stage_bounds`, remembered for all scenarios that are cut alike."""
    virtual = scenario.layout.virtual_stages
    alike = replace(
        scenario,
        layout=scenario.layout.model_copy(
            update={"tp": 1, "dp": 1, "ep": 1, "etp": None, "pp": virtual, "chunks": 1, "placement": "loop"}
        ),
        micro_size=1,
        num_micro_batches=1,
        schedule="1f1b",
        zero_stage=1,
        recompute="none",
        offload_optimizer="none",
        offload_parameters="none",
    )
    return _cached_bounds(alike)


@lru_cache(maxsize=1024)
def _cached_bounds(scenario: Scenario) -> tuple[int, ...]:
    return scenario.stage_bounds


def _by_rank(scenario: Scenario, stages: Stages) -> list[LayerTime]:
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


def _pipeline(
    scenario: Scenario,
    cluster: Cluster,
    times: Sequence[LayerTime],
    by_rank: Sequence[LayerTime],
    software: Software,
    simulated: bool,
) -> tuple[float, float]:
    """Waiting of the busiest rank, and messages that nothing hides."""
    layout, m = scenario.layout, scenario.num_micro_batches
    if layout.pp == 1:
        return 0.0, 0.0
    busy_s = m * max(time.total_s for time in by_rank)
    one_s = message_s(cluster, _message_bytes(scenario, software), world_size=layout.world_size)
    hidden_s = one_s if software.hides_transfers else 0.0
    exposed_s = 0.0 if software.hides_transfers else 2 * layout.chunks * m * one_s
    num_ops = 3 * m * layout.virtual_stages
    if simulated and num_ops <= MOST_SIMULATED_OPS:
        schedule = make_schedule(
            scenario.schedule, stages=layout.pp, chunks=layout.chunks, num_micro_batches=m
        )
        with_messages = simulate(schedule, _times(times, hidden_s)).makespan
        alone = simulate(schedule, _times(times, 0.0)).makespan if hidden_s else with_messages
        return alone - busy_s, with_messages - alone + exposed_s
    return bubble_s(scenario, by_rank), _waiting_for_messages(scenario, hidden_s) + exposed_s


def _times(times: Sequence[LayerTime], transfer_s: float) -> Times:
    return Times(
        tuple(time.forward.total_s for time in times),
        tuple(time.recompute.total_s + time.input_gradient.total_s for time in times),
        tuple(time.weight_gradient.total_s for time in times),
        transfer_s,
    )


def bubble_s(scenario: Scenario, by_rank: Sequence[LayerTime]) -> float:
    """Closed forms: the busiest rank waits while the others' shares of one micro-batch pass.

    1F1B and interleaved: Narayanan et al. 2021, section 2.2; ZB-H1 and ZB-V: Qi et al. 2024 (arXiv:2401.10241,
    arXiv:2405.15362), where the halves of backward passes are alike; the last, by the simulator, fills all but the
    forward passes.  All for as many micro-batches as keep every rank busy, twice the stages.
    """
    busiest = max(range(len(by_rank)), key=lambda rank: by_rank[rank].total_s)
    others = [time for rank, time in enumerate(by_rank) if rank != busiest]
    forward = sum(time.forward.total_s for time in others)
    inputs = sum(time.recompute.total_s + time.input_gradient.total_s for time in others)
    weights = sum(time.weight_gradient.total_s for time in others)
    chunks = scenario.layout.chunks
    if scenario.schedule == "zb-h1":
        return max(0.0, forward + inputs - weights)
    if scenario.schedule == "zb-v":
        pp, m = scenario.layout.pp, scenario.num_micro_batches
        missing = max(0.0, 2 * pp - m) / pp  # micro-batches, over the stages
        return max(0.0, forward + inputs - weights) / 2 * (1 + missing)
    if scenario.schedule == "interleaved-zb":
        return forward / chunks
    return (forward + inputs + weights) / chunks


def _waiting_for_messages(scenario: Scenario, message_s: float) -> float:
    """1F1B holds as many micro-batches as there are stages ahead, so it waits for a message each way, less a share of
    1/pp; the others wait where they fill and drain.
    """
    pp, chunks = scenario.layout.pp, scenario.layout.chunks
    if scenario.schedule == "1f1b":
        return 2 * message_s * (pp - 1) * (1 + scenario.num_micro_batches / pp)
    legs = 4 if scenario.schedule == "zb-h1" else 2
    return legs * (pp * chunks - 1) * message_s


def _message_bytes(scenario: Scenario, software: Software) -> float:
    layout = scenario.layout
    whole = (
        scenario.micro_size * scenario.sequence_length * scenario.model.hidden_size * BYTES[scenario.dtype]
    )
    return whole / layout.tp if layout.shards_sequence or software.scatters_transfers else float(whole)


def _sent_between_stages(scenario: Scenario, software: Software) -> float:
    if scenario.layout.pp == 1:
        return 0.0
    times = 2 * scenario.layout.chunks * scenario.num_micro_batches
    return times * _message_bytes(scenario, software)


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


def _data_parallel(
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


def _update(scenario: Scenario, cluster: Cluster, stages: Stages) -> tuple[float, float, float]:
    """The optimizer on the device, or copies to the host and the optimizer there; and the bytes of those copies."""
    shard = 0.0
    whole = 0.0
    for ranks, parameters in _copies(scenario, cluster, stages):
        shard += parameters / (ranks.size if scenario.zero_stage >= 1 else 1)
        whole += parameters
    device_s = shard * OPTIMIZER_BYTES / (cluster.device.memory_bytes_per_s * MEMORY_SHARE)
    offload_s = host_bytes = 0.0
    if scenario.offload_optimizer != "none":
        device_s, copied = 0.0, shard * sum(HOST_COPY_BYTES.values())
        host_bytes += copied
        offload_s += copied / cluster.host_bytes_per_s
        offload_s += shard * HOST_OPTIMIZER_BYTES / HOST_MEMORY_BYTES_PER_S
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


def _links(scenario: Scenario, cluster: Cluster, data_link: str) -> dict[str, str]:
    layout = scenario.layout
    spans_nodes = layout.world_size > cluster.devices_per_node
    return {
        "tensor": group(cluster, size=layout.tp).link,
        "expert": group(cluster, size=layout.ep * layout.expert_tp).link if layout.ep > 1 else "none",
        "pipeline": "none" if layout.pp == 1 else ("inter" if spans_nodes else "intra"),
        "data": data_link,
    }
