"""What does not go together, and the nearest that does: one rule, one small function, one sentence.

`faults` runs them all, so that a user sees every fault at once.  A rule returns None when it has nothing to say.
"""

import math
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from model_providers.layout import Layout, layout_problems
from pretrain.checkpoint import store
from pretrain.config import BatchConfig, RunConfig
from pretrain.ds_config import optimizer_is_offloaded
from pretrain.engine.schedules.catalogue import SCHEDULES, SPLIT_BACKWARD, schedule_fault
from pretrain.errors import RunError
from pretrain.expert_rules import EXPERT_RULES
from pretrain.fp8_rules import FP8_RULES
from pretrain.monitor.trackers import tracker_faults
from pretrain.nested import get
from pretrain.objective_rules import OBJECTIVE_RULES
from pretrain.offload_rules import OFFLOAD_RULES, nvme_needs_a_folder
from pretrain.optimizer_rules import OPTIMIZER_RULES, Rule, missing_package, shared_over_stages
from pretrain.recompute_rules import RECOMPUTE_RULES

AUTO_SCHEDULE = "auto"  # measured and chosen on the ranks, see engine/auto_schedule.py

if TYPE_CHECKING:  # Run holds what the rules look at; config_io imports this module
    from pretrain.config_io import Run


@dataclass(frozen=True)
class BatchSizes:
    """The three sizes in agreement: global = micro x accumulation x dp."""

    global_size: int
    micro_size: int
    accumulation_steps: int


def sizes(config: RunConfig, world_size: int, found: list[str]) -> tuple[Layout | None, BatchSizes | None]:
    """The layout and the batch sizes for this world; what does not fit is added to ``found``."""
    layout = config.layout
    model_ranks = layout.tp * layout.pp
    if world_size % model_ranks:
        near = sorted(
            {
                max(1, world_size // model_ranks) * model_ranks,
                math.ceil(world_size / model_ranks) * model_ranks,
            }
        )
        found.append(
            f"layout.tp={layout.tp} x layout.pp={layout.pp} = {model_ranks} ranks per model copy, but there "
            f"are {world_size} ranks: start {' or '.join(map(str, near))} ranks, or choose tp x pp among "
            f"{', '.join(str(n) for n in divisors(world_size))}"
        )
        return None, None
    dp = world_size // model_ranks
    batch = _agree(config.batch, dp, found)
    family = SCHEDULES.get(layout.schedule)
    whole = Layout(
        tp=layout.tp,
        pp=layout.pp,
        dp=dp,
        sequence_parallel=layout.sequence_parallel,
        chunks=layout.chunks,
        ep=layout.ep,
        etp=layout.etp,
        dispatcher=layout.dispatcher,
        placement=family.style if family is not None and layout.chunks == 2 else "loop",
    )
    return whole, batch


def faults(run: "Run", *, is_planned: bool = False) -> list[str]:
    """Everything that is wrong with a run, in the order of the rules.

    ``is_planned``: it will run elsewhere, and folders need not be here.
    """
    found = layout_problems(
        run.config.model, run.layout, run.config.data.sequence_length, run.config.target_length
    )
    rules = [rule for rule in RULES if not (is_planned and rule in RULES_OF_THIS_MACHINE)]
    return found + [sentence for rule in rules if (sentence := rule(run)) is not None]


def device_faults(run: "Run", device_type: str) -> list[str]:
    """What is wrong on this kind of device (``cpu`` or ``cuda``)."""
    found = []
    if run.config.precision.dtype == "fp16" and device_type == "cpu":
        found.append(
            "precision.dtype=fp16: DeepSpeed trains fp16 on GPUs only; use precision.dtype=bf16 or fp32 here"
        )
    if run.config.optimizer.type.lower() == "lamb" and device_type == "cpu":
        found.append("optimizer.type=Lamb: DeepSpeed has it for GPUs only; use AdamW or Lion here")
    found += tracker_faults(run.deepspeed)
    missing = missing_package(run)
    if missing is not None:
        found.append(missing)
    if get(dict(run.deepspeed), "aio.use_gds") and device_type == "cpu":
        found.append("aio.use_gds=true: GPUDirect Storage is between a disk and a GPU; use false here")
    if run.config.kernels == "te" and device_type == "cpu":
        found.append("kernels=te: Transformer Engine needs CUDA; use kernels=auto or kernels=torch here")
    if run.config.fp8 is not None and run.config.fp8.backend == "te" and device_type == "cpu":
        found.append("fp8.backend=te: Transformer Engine needs CUDA; use fp8.backend=auto or torch here")
    return found


def divisors(number: int) -> list[int]:
    """All divisors, smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _agree(batch: BatchConfig, dp: int, found: list[str]) -> BatchSizes | None:
    total, micro, steps = batch.global_size, batch.micro_size, batch.accumulation_steps
    if total is None and micro is None:
        found.append("batch: give batch.micro_size or batch.global_size (samples), or both")
        return None
    if total is None:
        assert micro is not None
        steps = steps or 1
        return BatchSizes(micro * steps * dp, micro, steps)
    if micro is None and steps is None:
        steps = 1
    if micro is None:
        assert steps is not None
        micro = total // (steps * dp)
    if steps is None:
        steps = total // (micro * dp)
    if micro < 1 or steps < 1 or micro * steps * dp != total:
        found.append(_batch_advice(batch, dp))
        return None
    return BatchSizes(total, micro, steps)


def _batch_advice(batch: BatchConfig, dp: int) -> str:
    unit = (batch.micro_size or 1) * (batch.accumulation_steps or 1) * dp
    assert batch.global_size is not None
    near = sorted({max(1, batch.global_size // unit) * unit, math.ceil(batch.global_size / unit) * unit})
    stated = [f"batch.global_size={batch.global_size}"]
    stated += [f"batch.micro_size={batch.micro_size}"] if batch.micro_size else []
    stated += [f"batch.accumulation_steps={batch.accumulation_steps}"] if batch.accumulation_steps else []
    if batch.micro_size and batch.accumulation_steps:
        return (
            f"{', '.join(stated)}: global must equal micro x accumulation x dp = {batch.micro_size} x "
            f"{batch.accumulation_steps} x {dp} = {unit}; leave one of the three out"
        )
    return (
        f"{', '.join(stated)}: not a multiple of {unit} (micro x accumulation x dp, dp={dp}); "
        f"nearest batch.global_size: {' or '.join(map(str, near))}"
    )


def sequence_parallel_needs_tp(run: "Run") -> str | None:
    if run.layout.sequence_parallel and run.layout.tp == 1:
        return "layout.sequence_parallel=true with layout.tp=1: there is nothing to split over; use tp > 1, or false"
    return None


def schedule_fits_the_layout(run: "Run") -> str | None:
    layout = run.config.layout
    if layout.pp == 1:
        stated = [f"layout.chunks={layout.chunks}"] if layout.chunks > 1 else []
        stated += [f"layout.schedule={layout.schedule}"] if layout.schedule != "1f1b" else []
        if not stated:
            return None
        return (
            f"{', '.join(stated)} with layout.pp=1: there is no pipeline; leave it out, or use layout.pp > 1"
        )
    if layout.schedule == AUTO_SCHEDULE:
        chosen = "chunks are chosen with the schedule"
        return (
            f"layout.chunks={layout.chunks} with layout.schedule=auto: {chosen}; leave it out"
            if layout.chunks > 1
            else None
        )
    return schedule_fault(
        layout.schedule, stages=layout.pp, chunks=layout.chunks, num_micro_batches=run.num_micro_batches
    )


def split_backward_needs_our_linears(run: "Run") -> str | None:
    layout = run.config.layout
    if run.config.kernels == "te" and layout.schedule in SPLIT_BACKWARD:
        return (
            f"layout.schedule={layout.schedule} with kernels=te: Transformer Engine's linears compute their weights' "
            "gradients at once, so nothing is left for the bubble; use kernels=torch, or 1f1b or interleaved"
        )
    return None


def pipeline_needs_zero_below_3(run: "Run") -> str | None:
    pp = run.layout.pp
    if pp > 1 and run.zero_stage == 3:
        return (
            f"zero_optimization.stage=3 cannot run with layout.pp={pp}: DeepSpeed gathers weights by one trace of all "
            f"ranks' layers, and stages have different ones. Use stage 1 with pp={pp}; or stage 1 and "
            f"offload_optimizer.device=cpu with pp={pp}; or stage 3 with pp=1"
        )
    return None


def zero_2_in_a_pipeline_is_sound(run: "Run") -> str | None:
    layout = run.config.layout
    if layout.pp == 1 or run.zero_stage != 2:
        return None
    where = f"zero_optimization.stage=2 with layout.pp={layout.pp}"
    if layout.schedule in SPLIT_BACKWARD:
        return (
            f"{where} and layout.schedule={layout.schedule}: gradient shards are summed after every backward pass, "
            "before the weights' half of it; use stage 1, or 1f1b or interleaved"
        )
    shared = shared_over_stages(run.config.model)
    if shared is not None:
        return (
            f"{where} and {shared.what}: the stages that hold the same weights shard them differently; use stage 1"
            + (", or model.tie_embeddings=false" if shared.is_by_choice else "")
        )
    if optimizer_is_offloaded(dict(run.deepspeed)):
        return f"{where} and offload_optimizer: not tried together; use stage 1"
    return None


def half_precision_needs_zero(run: "Run") -> str | None:
    dtype = run.config.precision.dtype
    if dtype != "fp32" and run.zero_stage == 0:
        return (
            f"zero_optimization.stage=0 with precision.dtype={dtype}: DeepSpeed would sum gradients in "
            f"{dtype} there; use stage 1 (at dp=1 it needs the same memory)"
        )
    return None


def accumulation_dtype_is_legal(run: "Run") -> str | None:
    dtype, accumulate = run.config.precision.dtype, run.config.precision.accumulate
    if accumulate not in ("fp32", dtype):
        return f"precision.accumulate={accumulate} with precision.dtype={dtype}: use fp32 or {dtype}"
    return None


def partitioned_messages_need_whole_activations(run: "Run") -> str | None:
    split = [
        key for key in ("pipe_partitioned", "grad_partitioned") if get(dict(run.deepspeed), f"pipeline.{key}")
    ]
    if split and run.layout.sequence_parallel:
        return (
            f"pipeline.{split[0]}=true with layout.sequence_parallel=true: activations are split over tp "
            "already and would be split twice, silently wrong; use false"
        )
    return None


def explicit_partition_is_sound(run: "Run") -> str | None:
    bounds = run.config.layout.partition
    if isinstance(bounds, str):
        return None
    model = run.config.model
    last = model.num_plan_layers
    rising = all(a < b for a, b in pairwise(bounds))
    if len(bounds) != run.layout.virtual_stages + 1 or bounds[0] != 0 or bounds[-1] != last or not rising:
        ahead = f", {model.mtp.depth} that look ahead" if model.mtp is not None else ""
        return (
            f"layout.partition={list(bounds)}: needs {run.layout.virtual_stages + 1} rising numbers from 0 to {last} "
            f"(embedding, {model.num_layers} layers, final norm{ahead}, head), each the first layer of a "
            "stage"
        )
    return None


def checkpoints_to_begin_from_are_there(run: "Run") -> str | None:
    resume, weights_from = run.config.checkpoint.resume, run.config.checkpoint.weights_from
    try:
        if resume not in ("auto", "never"):
            store.wanted(resume, key="checkpoint.resume")
        if weights_from is not None:
            store.wanted(weights_from, key="checkpoint.weights_from")
    except RunError as fault:
        return str(fault)
    return None


def changed_facts_are_of_other_weights(run: "Run") -> str | None:
    checkpoint = run.config.checkpoint
    if checkpoint.allow_changed and checkpoint.weights_from is None:
        return (
            f"checkpoint.allow_changed=[{', '.join(checkpoint.allow_changed)}]: against what? it goes with "
            "checkpoint.weights_from; leave it out"
        )
    return None


def output_folder_can_be_made(run: "Run") -> str | None:
    there = next(folder for folder in (run.folder, *run.folder.absolute().parents) if folder.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    why = "may not be written to" if there.is_dir() else "is a file"
    return f"out={run.config.out}: {there} {why}; choose another folder"


RULES: tuple[Rule, ...] = (
    sequence_parallel_needs_tp,
    schedule_fits_the_layout,
    split_backward_needs_our_linears,
    explicit_partition_is_sound,
    pipeline_needs_zero_below_3,
    zero_2_in_a_pipeline_is_sound,
    half_precision_needs_zero,
    accumulation_dtype_is_legal,
    partitioned_messages_need_whole_activations,
    checkpoints_to_begin_from_are_there,
    changed_facts_are_of_other_weights,
    output_folder_can_be_made,
    *FP8_RULES,
    *OFFLOAD_RULES,
    *EXPERT_RULES,
    *OBJECTIVE_RULES,
    *RECOMPUTE_RULES,
    *OPTIMIZER_RULES,
)
RULES_OF_THIS_MACHINE: tuple[Rule, ...] = (
    nvme_needs_a_folder,
    checkpoints_to_begin_from_are_there,
    changed_facts_are_of_other_weights,
    output_folder_can_be_made,
)
