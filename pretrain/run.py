"""The map of a run: groups, data, plan, engine, resume, train, close."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data_tools.training_data import TrainingData
from model_providers.families import build_plan
from model_providers.fp8.config import Fp8Config
from model_providers.layer_plan import (
    BERTInputs,
    ElectraInputs,
    GPTInputs,
    LayerPlan,
    Recompute,
    T5Inputs,
    Wire,
)
from model_providers.losses import WeightedLoss
from pretrain import run_lock
from pretrain.batches import Feed, open_run_data
from pretrain.checkpoint import save_load, store
from pretrain.checkpoint.fit import check_same_order, told_at_resume
from pretrain.checkpoint.source import check_source
from pretrain.checkpoint.state import RunState, make_state
from pretrain.checkpoint.store import TOKENIZER, WEIGHTS, write_whole
from pretrain.checkpoint.upcycle import Upcycler
from pretrain.checkpoint.weights import WeightLoader
from pretrain.config import RecomputeConfig
from pretrain.config_io import Run
from pretrain.config_rules import AUTO_SCHEDULE, device_faults
from pretrain.engine import auto_schedule, preflight
from pretrain.engine.base import Engine
from pretrain.engine.groups import Groups, join
from pretrain.engine.layers import tied_names
from pretrain.engine.pipeline import build_pipeline_engine
from pretrain.engine.schedules.ops import Placement
from pretrain.engine.stage_module import PipelineShape
from pretrain.engine.zero import build_zero_engine
from pretrain.errors import RunError
from pretrain.evaluate import evaluate_all
from pretrain.fp8_rules import emulated_on_cuda
from pretrain.fp8_te_rules import settled_fp8
from pretrain.loop import Loop, Outcome
from pretrain.monitor import banner, logs
from pretrain.monitor.eight_bits_watch import EightBitsWatch
from pretrain.monitor.experts import ExpertWatch
from pretrain.monitor.heartbeat import Heartbeat
from pretrain.monitor.sinks import ConsoleSink, DeepSpeedMonitors, ExpertLoadLines, JsonLines, Sink
from pretrain.monitor.trackers import engine_document, open_trackers
from pretrain.redaction import redacted
from pretrain.run_file import to_yaml
from pretrain.run_lock import RunLock

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(run: Run) -> Outcome:
    """Train ``run`` on the ranks that the launcher started; every rank calls it."""
    heartbeat = Heartbeat.of(os.environ)
    heartbeat.doing("joins the other ranks")
    groups = join(run.layout)
    lock = lock_folder(run, groups)
    try:
        return train_alone(run, groups, heartbeat)
    finally:
        if lock is not None:
            lock.release()


def lock_folder(run: Run, groups: Groups) -> RunLock | None:
    """The run's folder, for this run alone; rank 0 holds its lock, and left-overs of a killed start are removed."""
    lock, refusal = None, None
    if groups.is_first:
        try:
            lock = run_lock.take(run.folder, os.environ.get(run_lock.JOB_ID))
            store.remove_temporary(run.folder, run.checkpoints)
        except RunError as told:
            refusal = str(told)
    refusal = groups.first_told(refusal)
    if refusal is not None:
        raise RunError(refusal)
    return lock


def train_alone(run: Run, groups: Groups, heartbeat: Heartbeat) -> Outcome:
    """With the run's folder to itself."""
    heartbeat.doing("opens data, builds the model, loads a checkpoint")
    console = logs.start(groups.rank, run.folder if groups.is_first else None)
    check_place(run, groups)
    data = open_run_data(run, groups, heartbeat)
    plan = make_plan(run, groups)
    run, groups = settle_schedule(run, plan, groups)
    checkpoint = save_load.find(run, groups)
    engine = make_engine(run, plan, groups, begins=checkpoint is None, data=data)
    engine.timers.heartbeat = heartbeat
    state = resume(checkpoint, run, data, engine) if checkpoint else make_state(run, data, step=0)
    feed = make_feed(run, data, groups, state)
    eight_bits = make_eight_bits_watch(run, engine)
    barred = eight_bits.barred if eight_bits is not None else []
    sinks = (
        open_run_log(console, run, engine, plan, data, checkpoint, state, barred) if groups.is_first else []
    )
    if state.step >= run.config.train.steps and groups.is_first:
        log.info("all %d steps are done already; raise train.steps to go on, or use another name", state.step)
    loop = Loop(
        run=run,
        engine=engine,
        feed=feed,
        evaluate=lambda: evaluate_all(engine, data.validation, run),
        test=lambda: evaluate_all(engine, data.test, run),
        save=lambda step: save(run, engine, data, step, feed),
        sinks=sinks,
        watch=make_watch(run, engine, first_step=state.step),
        eight_bits=eight_bits,
    )
    try:
        return loop.train(state.step)
    finally:
        feed.close()
        for sink in sinks:
            sink.close()


def resume(checkpoint: Path, run: Run, data: TrainingData, engine: Engine) -> RunState:
    """Load a checkpoint, check that its samples go on, and log what takes effect from here on."""
    state = save_load.load(checkpoint, engine)
    check_same_order(state, data, run)
    if engine.groups.is_first:
        for line in told_at_resume(state, run):
            log.warning("%s", line)
    return state


def check_place(run: Run, groups: Groups) -> None:
    """What can be known only on the machines: the device, the disk, the compilers."""
    faults = device_faults(run, groups.device.type)
    if not save_load.ranks_share_a_disk(run.folder, groups):
        faults.append(
            f"out={run.config.out}: rank {groups.rank} does not see what rank 0 wrote to {run.folder}; use a "
            "folder on a disk that all nodes share"
        )
    if run.layout.dispatcher == "hierarchical" and groups.experts.nodes is None:
        faults.append(
            f"layout.dispatcher=hierarchical: the layout.ep={run.layout.ep} ranks that share experts lie on one "
            "machine, or unevenly on several; use alltoall"
        )
    faults += preflight.faults(run)
    fault = groups.first_told("; ".join(faults) or None)
    if fault is not None:
        raise RunError(fault)


def blank_inputs(run: Run, plan: LayerPlan, groups: Groups) -> Wire:
    """What the plan's first layer takes of one micro-batch, in the run's shapes."""
    shape = (run.micro_size, run.config.data.sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=groups.device)
    segments = torch.zeros(shape, dtype=torch.int32, device=groups.device)
    if plan.inputs_type is ElectraInputs:
        return ElectraInputs(tokens, tokens, segments).to_wire()
    if plan.inputs_type is BERTInputs:
        return BERTInputs(tokens).to_wire()
    if plan.inputs_type is T5Inputs:
        return T5Inputs(tokens, tokens.new_zeros(run.micro_size, run.config.target_length or 1)).to_wire()
    has_segments = run.config.data.documents == "reset" or run.config.model.attention == "prefix"
    return GPTInputs(tokens, segments if has_segments else None).to_wire()


def blank_targets(run: Run, inputs: Wire) -> tuple[torch.Tensor, ...]:
    """Labels and weights of one micro-batch, in the run's shapes."""
    length = run.config.target_length or run.config.data.sequence_length
    first = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
    labels = first.new_zeros(run.micro_size, length)
    return labels, torch.ones_like(labels, dtype=torch.float32)


def settle_schedule(run: Run, plan: LayerPlan, groups: Groups) -> tuple[Run, Groups]:
    """`layout.schedule: auto` becomes the schedule that is expected to be the fastest here; every rank calls it."""
    if run.config.layout.schedule != AUTO_SCHEDULE or run.layout.pp == 1:
        return run, groups
    inputs = blank_inputs(run, plan, groups)
    layers, transfer_s = auto_schedule.measure(plan, inputs, groups, blank_targets(run, inputs))
    if isinstance(plan.loss, WeightedLoss):
        plan.loss.take_ahead()  # of blank tokens
    found = auto_schedule.candidates(
        run,
        layers,
        transfer_s,
        on_nccl=groups.device.type == "cuda",
        only=save_load.placement_of_newest(run, groups),
    )
    best = found[0]
    if groups.is_first:
        log.info("layout.schedule=auto takes %s", best.title)
        for other in found[1:4]:
            log.info("  before %s", other.title)
    messages = best.messages if groups.device.type == "cuda" else None
    run = auto_schedule.settled(run, best.schedule, best.chunks, messages)
    return run, replace(groups, layout=run.layout)


def make_plan(run: Run, groups: Groups) -> LayerPlan:
    """The model as layers, for this rank's place."""
    config, fp8 = run.config, make_fp8(run, groups)
    return build_plan(
        config.model,
        run.layout,
        groups.collection,
        seed=config.train.seed,
        sequence_length=config.data.sequence_length,
        target_length=config.target_length,
        params_dtype=DTYPES[config.precision.dtype],
        device=groups.device,
        kernels=config.kernels,
        recompute=recompute_of(config.recompute),
        nodes=groups.experts.nodes,
        fp8=fp8,
        chunk_tokens=run.chunk_tokens,
    )


def make_fp8(run: Run, groups: Groups) -> Fp8Config | None:
    """The run's wish, with what the run itself says about whose layers; one line for each surprise."""
    fp8, said = settled_fp8(run)
    on_cuda = groups.device.type == "cuda"
    if said is not None and on_cuda and groups.is_first:
        log.info("%s", said)
    if fp8 is not None and fp8.backend == "torch" and on_cuda and groups.is_first:
        emulated = emulated_on_cuda(run, fp8)
        if emulated is not None:
            log.warning("%s", emulated)
    return fp8


def make_feed(run: Run, data: TrainingData, groups: Groups, state: RunState) -> Feed:
    """The samples from where ``state`` stands."""
    return Feed(
        data.train,
        run,
        groups,
        consumed_samples=state.consumed_samples,
        consumed_tokens=state.consumed_tokens,
        unverified=data.unverified,
    )


def make_engine(
    run: Run, plan: LayerPlan, groups: Groups, *, begins: bool = True, data: TrainingData | None = None
) -> Engine:
    """The engine that the layout asks for, with initial weights from the seed or from `checkpoint.weights_from`.

    ``begins``: no checkpoint of the run is loaded later; ``data``: must be in the vocabulary of those weights.
    """
    document = preflight.prepare_native_parts(engine_document(run.deepspeed), groups)
    arguments: dict[str, Any] = {"json": document, "optimizer": run.config.optimizer}
    source = save_load.find_source(run, groups) if begins else None
    if source is not None:
        check_source(run, source, data)
        folder = source / WEIGHTS
        place, tied = run.layout.tensor_place(groups.rank), tied_names(plan)
        arguments["prepare"] = [
            Upcycler(folder, place, tied=tied, model=run.config.model)
            if run.config.checkpoint.upcycle
            else WeightLoader(folder, place, tied=tied)
        ]
    if run.layout.pp == 1:
        return build_zero_engine(plan, groups, **arguments)
    return build_pipeline_engine(plan, groups, pipeline_shape(run), **arguments)


def recompute_of(config: RecomputeConfig) -> Recompute:
    above = config.offload_above_bytes if config.offload else None
    return Recompute(config.mode, config.every, config.forgotten, above)


def pipeline_shape(run: Run) -> PipelineShape:
    """Where the layers lie, and in which order the stages work."""
    layout, wishes = run.layout, run.config.layout
    return PipelineShape(
        schedule=wishes.schedule,
        placement=Placement(layout.pp, layout.chunks, layout.placement),
        bounds=run.stage_bounds,
        messages=wishes.messages,
        hang_s=run.config.monitor.hang_s,
    )


def make_watch(run: Run, engine: Engine, *, first_step: int) -> ExpertWatch | None:
    """What looks into the model; None where there is nothing to see but the loss."""
    model, monitor = run.config.model, run.config.monitor
    if model.moe is None and model.mtp is None:
        return None
    return ExpertWatch(
        engine,
        num_experts=model.moe.num_experts if model.moe is not None else 0,
        top_k=model.moe.top_k if model.moe is not None else 0,
        starving_below=monitor.starving_below,
        starving_steps=monitor.starving_steps,
        last_step=first_step,
    )


def make_eight_bits_watch(run: Run, engine: Engine) -> EightBitsWatch | None:
    """What looks at FP8 linears, after the checkpoint is loaded; every rank calls it.  None without FP8."""
    fp8 = run.config.fp8
    if fp8 is None:
        return None
    return EightBitsWatch(engine, fp8, micro_size=run.micro_size, wide=run.config.precision.dtype)


def save(run: Run, engine: Engine, data: TrainingData, step: int, feed: Feed) -> bool:
    """A checkpoint after ``step`` steps; False if the disk has no room for it."""
    state = make_state(
        run,
        data,
        step=step,
        consumed_samples=feed.consumed_samples,
        consumed_tokens=feed.consumed_tokens,
    )
    folder = save_load.save(run, engine, state, run.folder / TOKENIZER)
    if engine.groups.is_first:
        log.info("saved %s" if folder else "NOT saved for want of disk space: step %s", folder or step)
    return folder is not None


def open_run_log(
    console: Console,
    run: Run,
    engine: Engine,
    plan: LayerPlan,
    data: TrainingData,
    checkpoint: Path | None,
    state: RunState,
    barred: Sequence[str],
) -> list[Sink]:
    """The run folder's files, the banner and the sinks; rank 0 only."""
    data.tokenizer.save(run.folder / TOKENIZER)
    write_whole(run.folder / "run.yaml", to_yaml(run.config))
    document = json.dumps(redacted(run.deepspeed), indent=2)
    write_whole(run.folder / "deepspeed.json", document + "\n")
    banner.show(console, run, engine, plan, resumed=checkpoint, barred=barred)
    trackers = open_trackers(run.deepspeed, resumed_step=state.step)
    texts = {"run": to_yaml(run.config), "deepspeed": document}
    return [
        JsonLines(run.folder / "metrics.jsonl", resumed_step=state.step),
        ExpertLoadLines(run.folder / "expert_loads.jsonl", resumed_step=state.step),
        DeepSpeedMonitors(trackers, resumed_step=state.step, texts=texts),
        ConsoleSink(console, num_steps=run.config.train.steps, first_step=state.step),
    ]
