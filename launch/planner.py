"""The search for a layout: every one that is legal, those that fit into memory, the fastest first.

What is legal is asked of the same rules that judge a run file.  What only saves memory and costs time (recompute,
offload) is taken up step by step where the step before does not fit, since it can never win otherwise.  Closed forms
of bubbles rank all layouts; the simulator then times the best again.

Not searched: context parallelism, which this engine does not have; gpipe, which is 1f1b with more memory; tensor
groups wider than a node; selective recompute where attention is fused and keeps no scores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise, product
from typing import NamedTuple

from launch.hardware import Cluster
from launch.layer_time import BYTES
from launch.scenario import Scenario
from launch.step_time import StepTime, stage_bounds, step_time
from model_providers.activation_memory import RecomputeMode
from model_providers.config import ModelConfig
from model_providers.cost import layer_costs, state_bytes_per_parameter
from model_providers.layout import Layout, layout_problems
from pretrain import config_rules
from pretrain.config import Dtype, RunConfig
from pretrain.config_io import Run
from pretrain.ds_config import Place
from pretrain.engine.schedules.catalogue import SCHEDULES
from pretrain.errors import RunError
from pretrain.optimizer_rules import Rule

LARGEST_MICRO_SIZE = 32
MOST_CHUNKS = 8
# Rules about disks and checkpoints of a run that nobody has started yet.
ABOUT_PLACES: tuple[Rule, ...] = (
    config_rules.nvme_needs_a_folder,
    config_rules.nvme_buffers_hold_the_largest_parameter,
    config_rules.checkpoints_to_begin_from_are_there,
    config_rules.output_folder_can_be_made,
)
LAYOUT_RULES = tuple(rule for rule in config_rules.RULES if rule not in ABOUT_PLACES)
# CUDA's context, NCCL's buffers and what an allocator cannot hand out again.
RESERVED_BYTES = 3e9
FRAGMENTED_SHARE = 0.05


@dataclass(frozen=True)
class Task:
    """What is to be trained, on what, in which steps."""

    config: RunConfig  # its layout and batch are what the search replaces
    cluster: Cluster
    num_devices: int
    global_size: int  # samples per optimizer step

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def sequence_length(self) -> int:
        return self.config.data.sequence_length

    @property
    def dtype(self) -> Dtype:
        return self.config.precision.dtype


class Saving(NamedTuple):
    """What is given up for memory."""

    recompute: RecomputeMode = "none"
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"


SAVINGS = (
    Saving(),
    Saving("full"),
    Saving("none", "cpu"),
    Saving("full", "cpu"),
    Saving("full", "cpu", "cpu"),
    Saving("full", "nvme", "nvme"),
)


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


@dataclass(frozen=True)
class Candidate:
    """A legal layout that fits, and what a step of it takes."""

    scenario: Scenario
    step: StepTime
    memory: Memory


@dataclass(frozen=True)
class Search:
    """What was looked at, and what is left of it, the fastest first."""

    task: Task
    candidates: tuple[Candidate, ...]
    num_layouts: int  # looked at
    num_illegal: int
    num_too_large: int
    closest: Memory | None  # of those that do not fit, the one that lacks least


def search(task: Task, *, top: int = 10) -> Search:
    """Every layout; the best ``top`` are timed by the simulator.

    Raises:
        RunError: nothing is legal, or nothing fits.
    """
    found: list[Candidate] = []
    num_layouts = num_illegal = num_too_large = 0
    closest: Memory | None = None
    fault = ""
    for scenario in scenarios(task):
        num_layouts += 1
        refused = illegal(task, scenario)
        if refused is not None:
            num_illegal, fault = num_illegal + 1, refused
            continue
        saved, memory, tried = _with_least_savings(task, scenario)
        num_layouts += tried - 1
        if saved is None:
            num_too_large += tried
            if closest is None or memory.total_bytes < closest.total_bytes:
                closest = memory
            continue
        num_too_large += tried - 1
        found.append(Candidate(saved, step_time(saved, task.cluster, simulated=False), memory))
    if not found:
        raise RunError(_nothing(task, closest, fault))
    found.sort(key=lambda candidate: candidate.step.total_s)
    best = [replace(one, step=step_time(one.scenario, task.cluster)) for one in found[: 2 * top]]
    best.sort(key=lambda candidate: candidate.step.total_s)
    ranked = (*best, *found[2 * top :])
    return Search(task, ranked, num_layouts, num_illegal, num_too_large, closest)


def scenarios(task: Task) -> Iterator[Scenario]:
    """All layouts of as many devices, before anybody judges them."""
    for layout in layouts(task):
        if task.global_size % layout.dp:
            continue
        each = task.global_size // layout.dp
        micro_sizes = [n for n in _powers_of_2(LARGEST_MICRO_SIZE) if each % n == 0]
        for (schedule, chunks), micro_size, zero_stage in product(
            schedules(layout.pp), micro_sizes, (1, 2, 3) if layout.pp == 1 else (1, 2)
        ):
            placement = SCHEDULES[schedule].style
            yield Scenario(
                model=task.model,
                layout=layout.model_copy(update={"chunks": chunks, "placement": placement}),
                sequence_length=task.sequence_length,
                micro_size=micro_size,
                num_micro_batches=each // micro_size,
                schedule=schedule,
                zero_stage=0 if task.dtype == "fp32" and zero_stage == 1 and layout.dp == 1 else zero_stage,
                dtype=task.dtype,
                gradient_dtype=task.config.precision.accumulate,
                target_length=task.config.target_length,
                partition=task.config.layout.partition if _names_a_method(task.config) else "cost",
            )


def layouts(task: Task) -> Iterator[Layout]:
    """Tensor groups within a node, pipelines of what divides the rest, experts shared out within stages."""
    for tp in _powers_of_2(task.cluster.devices_per_node):
        if task.num_devices % tp:
            continue
        for pp in config_rules.divisors(task.num_devices // tp):
            if pp > task.model.num_plan_layers:
                break
            dp = task.num_devices // (tp * pp)
            for ep, etp in _expert_sizes(task.model, tp, dp):
                yield Layout(tp=tp, pp=pp, dp=dp, sequence_parallel=tp > 1, ep=ep, etp=etp)


def schedules(pp: int) -> list[tuple[str, int]]:
    """Names with numbers of chunks."""
    if pp == 1:
        return [("1f1b", 1)]
    many = [
        (name, chunks) for name in ("interleaved", "interleaved-zb") for chunks in range(2, MOST_CHUNKS + 1)
    ]
    return [("1f1b", 1), ("eager", 1), ("zb-h1", 1), ("zb-v", 2), *many]


def _expert_sizes(model: ModelConfig, tp: int, dp: int) -> list[tuple[int, int | None]]:
    if model.moe is None:
        return [(1, None)]
    shared = [ep for ep in config_rules.divisors(model.moe.num_experts) if ep > 1 and ep <= tp * dp]
    etps = [None] if tp == 1 else [None, 1]
    return [(1, None), *((ep, etp) for ep in shared for etp in etps)]


def illegal(task: Task, scenario: Scenario) -> str | None:
    """The first sentence that a run file of this layout would be refused with."""
    cut = _cannot_be_cut(scenario.model, scenario.layout, scenario.sequence_length, scenario.target_length)
    if cut is not None:
        return cut
    run = as_run(task, scenario)
    return next((sentence for rule in LAYOUT_RULES if (sentence := rule(run)) is not None), None)


@lru_cache(maxsize=65536)
def _cannot_be_cut(
    model: ModelConfig, layout: Layout, sequence_length: int, target_length: int | None
) -> str | None:
    return next(iter(layout_problems(model, layout, sequence_length, target_length)), None)


def as_run(task: Task, scenario: Scenario) -> Run:
    """A run as far as rules look at it; its JSON is not completed."""
    layout = scenario.layout
    stated = task.config.layout.model_copy(
        update={
            "tp": layout.tp,
            "pp": layout.pp,
            "ep": layout.ep,
            "etp": layout.etp,
            "sequence_parallel": layout.sequence_parallel,
            "chunks": layout.chunks,
            "schedule": scenario.schedule,
        }
    )
    recompute = task.config.recompute.model_copy(update={"mode": scenario.recompute})
    zero: dict[str, object] = {"stage": scenario.zero_stage}
    for section, place in (
        ("offload_optimizer", scenario.offload_optimizer),
        ("offload_param", scenario.offload_parameters),
    ):
        if place != "none":
            zero[section] = {"device": place}
    document = {
        "zero_optimization": zero,
        "train_batch_size": scenario.global_size,
        "train_micro_batch_size_per_gpu": scenario.micro_size,
        "gradient_accumulation_steps": scenario.num_micro_batches,
        "gradient_clipping": task.config.optimizer.gradient_clipping,
    }
    config = task.config.model_copy(update={"layout": stated, "recompute": recompute})
    return Run(config, document, layout, {})


def _with_least_savings(task: Task, scenario: Scenario) -> tuple[Scenario | None, Memory, int]:
    """The scenario with as little recompute and offload as makes it fit, its memory, and how many were tried."""
    tried = 1
    memory = fits(scenario, task.cluster)
    if memory.fits:
        return scenario, memory, tried
    for saving in SAVINGS[1:]:
        saved = replace(scenario, **saving._asdict())
        if illegal(task, saved) is not None:
            continue
        tried += 1
        memory = min(memory, fits(saved, task.cluster), key=lambda each: each.total_bytes)
        if memory.fits:
            return saved, memory, tried
    return None, memory, tried


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


def _nothing(task: Task, closest: Memory | None, fault: str) -> str:
    where = f"--gpus={task.num_devices} with --device={task.cluster.name}"
    if closest is not None:
        return (
            f"{where}: no layout fits; the nearest needs {closest.total_bytes / 1e9:.0f} GB a device of "
            f"{closest.limit_bytes / 1e9:.0f}; use more devices, larger ones, or a smaller model"
        )
    if fault:
        return f"{where}: no layout is legal; the last one said: {fault}"
    return (
        f"{where}: no number of copies of the model divides --global-size={task.global_size}; use a multiple of "
        f"{task.num_devices}"
    )


def _names_a_method(config: RunConfig) -> bool:
    return isinstance(config.layout.partition, str)


def _powers_of_2(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def lacks(best: StepTime, other: StepTime) -> Sequence[tuple[str, float]]:
    """The parts on which the other spends more, in seconds, most first."""
    mine, theirs = best.parts, other.parts
    more = [(name, theirs[name] - mine[name]) for name in mine]
    return sorted((part for part in more if part[1] > 0), key=lambda part: -part[1])
