"""The search for a layout: every one that is legal, those that fit into memory, the fastest first.

What is legal is asked of the same rules that judge a run file.  What only saves memory and costs time (recompute,
offload) is taken up step by step where the step before does not fit, since it can never win otherwise.  Closed forms
of bubbles rank all layouts; the simulator then times the best again.

Not searched: context parallelism, which this engine does not have; gpipe, which is 1f1b with more memory; tensor
groups wider than a node; selective recompute of more than core attention and norms.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from launch.fitting import Fit, fits
from launch.hardware import Cluster
from launch.legality import allowed, illegal, settled
from launch.scenario import Scenario, optimizer_of
from launch.step_time import StepTime, step_time
from model_providers.activation_memory import RecomputeMode
from model_providers.config import ModelConfig
from model_providers.layout import Layout
from model_providers.loss_chunks import chunk_tokens
from pretrain import config_rules
from pretrain.config import Dtype, RunConfig
from pretrain.ds_offload import Place
from pretrain.engine.schedules.catalogue import SCHEDULES
from pretrain.errors import RunError

LARGEST_MICRO_SIZE = 32
MOST_CHUNKS = 8


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


CHEAP_MODULES = ("core_attn", "layernorm")  # to compute again: where attention is fused, norms keep more


class Saving(NamedTuple):
    """What is given up for memory."""

    recompute: RecomputeMode = "none"
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"
    recompute_modules: tuple[str, ...] = CHEAP_MODULES


SAVINGS = (
    Saving(),
    Saving("selective"),
    Saving("full"),
    Saving("none", "cpu"),
    Saving("full", "cpu"),
    Saving("full", "cpu", "cpu"),
    Saving("full", "nvme", "nvme"),
)


@dataclass(frozen=True)
class Candidate:
    """A legal layout that fits, and what a step of it takes."""

    scenario: Scenario
    step: StepTime
    memory: Fit


@dataclass(frozen=True)
class Search:
    """What was looked at, and what is left of it, the fastest first."""

    task: Task
    candidates: tuple[Candidate, ...]
    num_layouts: int  # looked at
    num_illegal: int
    num_too_large: int
    closest: Fit | None  # of those that do not fit, the one that lacks least


def search(task: Task, *, top: int = 10) -> Search:
    """Every layout; the best ``top`` are timed by the simulator.

    Raises:
        RunError: nothing is legal, or nothing fits.
    """
    found: list[Candidate] = []
    num_layouts = num_illegal = num_too_large = 0
    closest: Fit | None = None
    fault = ""
    for scenario in scenarios(task):
        num_layouts += 1
        refused = illegal(task.config, scenario)
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
                chunk_tokens=chunk_tokens(
                    task.config.loss.chunk_tokens,
                    task.model,
                    num_tokens=micro_size * (task.config.target_length or task.sequence_length),
                    tp=layout.tp,
                ),
                target_length=task.config.target_length,
                optimizer=optimizer_of(task.config.optimizer),
                partition=task.config.layout.partition if _names_a_method(task.config) else "cost",
                fp8=task.config.fp8,
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


def _with_least_savings(task: Task, scenario: Scenario) -> tuple[Scenario | None, Fit, int]:
    """The scenario with as little recompute and offload as makes it fit, its memory, and how many were tried."""
    tried = 1
    scenario = settled(task.config, scenario)
    memory = fits(scenario, task.cluster)
    if memory.fits:
        return scenario, memory, tried
    for saving in SAVINGS[1:]:
        saved = allowed(task.config, replace(scenario, **saving._asdict()))
        if saved is None:
            continue
        tried += 1
        memory = min(memory, fits(saved, task.cluster), key=lambda each: each.total_bytes)
        if memory.fits:
            return saved, memory, tried
    return None, memory, tried


def _nothing(task: Task, closest: Fit | None, fault: str) -> str:
    where = f"--gpus={task.num_devices} with --device={task.cluster.name}"
    if closest is not None:
        return f"{where}: no layout fits; the nearest needs {closest.lack}; use more or larger devices"
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
