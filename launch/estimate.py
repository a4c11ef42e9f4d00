"""`megaloom estimate`: what a run will take of each rank's memory, of arithmetic, of links and of time.

Works on a laptop for a thousand ranks: nothing is asked of this machine, no corpus, no GPU, no torch.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.examined_cluster import described
from launch.hardware import CLUSTERS, Cluster
from launch.legality import allowed
from launch.memory import Memory, RankMemory, memory, optimizer_bytes_per_parameter
from launch.remedies import Remedy, remedies
from launch.run import positive
from launch.scenario import Scenario, scenario_of
from launch.step_time import StepTime, step_time
from launch.time_tables import GIB, time_lines, time_table
from model_providers.config import ModelConfig
from model_providers.cost import active_parameters, parameters, train_flops_per_token
from model_providers.errors import ModelError
from model_providers.presets import get_preset
from pretrain.config_io import Run, load_run, run_with
from pretrain.errors import RunError
from pretrain.optimizer_facts import canonical

DEVICE_GIB = 80.0
RESERVE_GIB = 4.0  # a guess: CUDA's context, NCCL's buffers, and what the allocator cannot use
PIPED_WIDTH = 140


@dataclass(frozen=True)
class Estimate:
    """What follows from a scenario and a device's memory."""

    run: Run
    cluster: Cluster | None  # none: no time is told
    memory_gib: float
    reserve_gib: float
    tokens: float | None = None  # to train on

    @cached_property
    def scenario(self) -> Scenario:
        return scenario_of(self.run)

    @cached_property
    def memory(self) -> Memory:
        return memory(self.scenario)

    @property
    def limit_bytes(self) -> float:
        """What tensors may take."""
        return (self.memory_gib - self.reserve_gib) * GIB

    @property
    def fits(self) -> bool:
        return self.memory.heaviest.device.total <= self.limit_bytes

    @cached_property
    def step(self) -> StepTime | None:
        return None if self.cluster is None else step_time(self.scenario, self.cluster)

    @cached_property
    def remedies(self) -> list[Remedy]:
        if self.fits:
            return []
        return remedies(self.scenario, self.limit_bytes, partial(allowed, self.run.config))

    @property
    def flops_per_token(self) -> float:
        """Of the model, forward and backward: what MFU counts (model_providers/cost.py)."""
        scenario = self.scenario
        return train_flops_per_token(
            scenario.model, scenario.sequence_length, target_length=scenario.target_length
        )

    @property
    def flops_per_step(self) -> float:
        return self.flops_per_token * self.scenario.tokens_per_step


def main(argv: list[str]) -> None:
    words = parser().parse_intermixed_args(argv)
    check_words(words)
    run = planned_run(words)
    cluster, memory_gib = cluster_of(words), words.memory_gib
    if memory_gib is None:
        memory_gib = DEVICE_GIB if cluster is None else cluster.device.memory_bytes / GIB
    estimate = Estimate(run, cluster, memory_gib, words.reserve_gib, words.tokens)
    if words.json:
        print(json.dumps(as_json(estimate), indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False)
    for section in (model_table, memory_table):
        console.print(section(estimate))
    lines = verdict(estimate)
    if estimate.step is not None:
        console.print(time_table(estimate.step))
        lines = [*time_lines(estimate.step, estimate.tokens), *lines]
    for line in lines:
        console.print(line, soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom estimate", description=__doc__, allow_abbrev=False)
    own.add_argument("run", nargs="?", help="run file (YAML); or --model instead")
    own.add_argument(
        "words", nargs="*", metavar="key=value", help="overrides, such as layout.tp=8 recompute=full"
    )
    own.add_argument(
        "--model", metavar="PRESET", help="a model alone, in bf16 under ZeRO-1 if nothing says else"
    )
    own.add_argument("--ranks", type=positive, default=1, help="size of the world (default: 1)")
    own.add_argument(
        "--deepspeed_config", metavar="FILE", help="DeepSpeed JSON; overrides the run file's `deepspeed`"
    )
    own.add_argument(
        "--memory-gib", type=float, metavar="GIB", help="of one device (default: of --device, else 80)"
    )
    own.add_argument(
        "--device",
        metavar="NAME",
        help=f"tell time too: on {', '.join(CLUSTERS)}, or a .yaml or .json that describes a cluster",
    )
    own.add_argument("--gpus-per-node", type=positive, help="with --device (default: the preset's)")
    own.add_argument("--tokens", type=float, help="with --device: to train on, for days and device-hours")
    own.add_argument(
        "--reserve-gib",
        type=float,
        default=RESERVE_GIB,
        metavar="GIB",
        help="of it for CUDA, NCCL and the allocator: a guess (default: 4)",
    )
    own.add_argument("--json", action="store_true", help="print numbers for programs")
    return own


def check_words(words: argparse.Namespace) -> None:
    """What argparse cannot tell; a preset in place of a run file leaves the first word to the overrides."""
    if words.model is not None and words.run is not None and "=" in words.run:
        words.run, words.words = None, [words.run, *words.words]
    if words.model is not None and words.run is not None:
        raise RunError(f"--model={words.model} with {words.run}: give a run file or a model, not both")
    if words.model is None and words.run is None:
        raise RunError(
            "nothing to estimate: give a run file, such as pretrain/runs/demo.yaml, or --model=llama3-8b"
        )
    for name in ("gpus_per_node", "tokens"):
        if getattr(words, name) is not None and words.device is None:
            raise RunError(
                f"--{name.replace('_', '-')}: tells of time, for which --device is needed, such as h100"
            )
    if words.tokens is not None and not 0 < words.tokens < float("inf"):
        raise RunError(f"--tokens={words.tokens:g}: must be a number above 0, such as 300e9")
    for name in ("memory_gib", "reserve_gib"):
        value = getattr(words, name)
        if value is not None and not 0 <= value < float("inf"):
            raise RunError(f"--{name.replace('_', '-')}={value:g}: must be a number of GiB, 0 or more")
    if words.memory_gib is not None and words.memory_gib <= words.reserve_gib:
        raise RunError(
            f"--memory-gib={words.memory_gib:g}: nothing is left after --reserve-gib={words.reserve_gib:g}; "
            "give a device's whole memory, such as 80"
        )


def cluster_of(words: argparse.Namespace) -> Cluster | None:
    if words.device is None:
        return None
    return described(words.device, devices_per_node=words.gpus_per_node)


def planned_run(words: argparse.Namespace) -> Run:
    if words.model is None:
        return load_run(
            words.run,
            words.words,
            world_size=words.ranks,
            deepspeed_config=words.deepspeed_config,
            is_planned=True,
        )
    return run_with(
        preset_run(words.model),
        words.words,
        world_size=words.ranks,
        run_name=f"--model={words.model}",
        deepspeed_config=words.deepspeed_config,
        is_planned=True,
    )


def preset_run(name: str) -> dict[str, Any]:
    """A run file for a model alone: samples as long as it was made for, one at a time."""
    try:
        model: ModelConfig = get_preset(name)
    except ModelError as fault:
        raise RunError(f"--model: {fault}") from None
    data: dict[str, Any] = {"train": "corpus", "sequence_length": model.max_sequence_length}
    objective = usual_objective(model)
    if objective is not None:
        data["objective"] = objective
    return {
        "name": name,
        "model": {"preset": name},
        "data": data,
        "batch": {"micro_size": 1},
        "precision": "bf16",
        "train": {"steps": 1},
    }


def usual_objective(model: ModelConfig) -> dict[str, Any] | None:
    """The one that a model was made for; None is the next token."""
    if model.family == "bert":
        return {"kind": "mlm", "replaced": model.electra is not None}
    if model.family == "t5":
        return {"kind": "span_corruption"}
    return {"kind": "prefix_lm"} if model.attention == "prefix" else None


# ---- what is printed


def model_table(estimate: Estimate) -> Table:
    scenario = estimate.scenario
    model, layout = scenario.model, scenario.layout
    table = Table.grid(padding=(0, 2))
    active = active_parameters(model)
    of_a_token = f", of which a token meets {_count(active)}" if model.moe is not None else ""
    table.add_row("model", f"{_count(parameters(model))} parameters{of_a_token}")
    table.add_row(
        "ranks", f"{layout.world_size}: tp={layout.tp} pp={layout.pp} dp={layout.dp} ep={layout.ep}"
    )
    table.add_row(
        "step",
        f"{scenario.global_size} samples of {scenario.sequence_length} tokens: {scenario.num_micro_batches} "
        f"micro-batches of {scenario.micro_size} on each of {layout.dp} copies",
    )
    kept = optimizer_bytes_per_parameter(scenario)
    table.add_row(
        "optimizer",
        f"{canonical(scenario.optimizer.kind)}: {kept:.3g} bytes of states a parameter, before ZeRO divides them",
    )
    table.add_row(
        "arithmetic",
        f"{estimate.flops_per_token:.4g} FLOPs a token, {estimate.flops_per_step:.4g} a step (the model's, without "
        "recompute)",
    )
    return table


KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers", "workspace")


def memory_table(estimate: Estimate) -> Table:
    """GiB of one rank of each stage."""
    has_host = any(rank.cpu.total or rank.nvme.total for rank in estimate.memory.ranks)
    host = ["CPU", "NVMe"] if has_host else []
    table = Table("stage", "layers", *KINDS, "at once", *host, title="GiB on each rank, by pipeline stage")
    heaviest = estimate.memory.heaviest.stage
    for rank in estimate.memory.ranks:
        total = Text(_gib(rank.device.total), style="bold" if rank.stage == heaviest else "")
        parts = (_gib(getattr(rank.device, kind)) for kind in KINDS)
        row: list[str | Text] = [*parts, total]
        row += [_gib(rank.cpu.total), _gib(rank.nvme.total)] if has_host else []
        table.add_row(str(rank.stage), _layers(rank), *row)
    if any(rank.device.not_together for rank in estimate.memory.ranks):
        table.caption = "at once: some gradients come as activations go, so it is less than the sum"
    return table


def verdict(estimate: Estimate) -> list[str]:
    """Whether the heaviest rank fits, and what would make it."""
    heaviest = estimate.memory.heaviest
    need, limit = heaviest.device.total / GIB, estimate.limit_bytes / GIB
    room = f"{estimate.memory_gib:g} GiB less {estimate.reserve_gib:g} in reserve"
    where = f"stage {heaviest.stage}" if len(estimate.memory.ranks) > 1 else "every rank"
    if estimate.fits:
        return [f"fits: {where} needs {need:.1f} GiB of {limit:.1f} ({room})"]
    lines = [f"does not fit: {where} needs {need:.1f} GiB of {limit:.1f} ({room})"]
    for remedy in estimate.remedies:
        lines.append(f"  with {' '.join(remedy.words)}: {remedy.device_bytes / GIB:.1f} GiB")
    if not estimate.remedies:
        lines.append(
            "  no one or two edits make it fit on these ranks: use more of them (--ranks), or a smaller model"
        )
    return lines


def as_json(estimate: Estimate) -> dict[str, Any]:
    return {
        **_time_as_json(estimate),
        "parameters": parameters(estimate.scenario.model),
        "active_parameters": active_parameters(estimate.scenario.model),
        "ranks": estimate.scenario.layout.world_size,
        "optimizer": {
            "type": canonical(estimate.scenario.optimizer.kind),
            "state_bytes_per_parameter": optimizer_bytes_per_parameter(estimate.scenario),
        },
        "tokens_per_step": estimate.scenario.tokens_per_step,
        "flops_per_token": estimate.flops_per_token,
        "flops_per_step": estimate.flops_per_step,
        "stages": [_rank_as_json(rank) for rank in estimate.memory.ranks],
        "heaviest_stage": estimate.memory.heaviest.stage,
        "limit_bytes": estimate.limit_bytes,
        "fits": estimate.fits,
        "remedies": [
            {"words": list(remedy.words), "device_bytes": remedy.device_bytes} for remedy in estimate.remedies
        ],
    }


def _time_as_json(estimate: Estimate) -> dict[str, Any]:
    step = estimate.step
    if step is None:
        return {}
    facts: dict[str, Any] = {
        "device": step.cluster.device.name,
        "step_s": step.total_s,
        "parts": step.parts,
        "bubble_share": step.bubble_share,
        "traffic_bytes": step.traffic._asdict(),
        "links": step.links,
        "tokens_per_s": step.tokens_per_s,
        "tflops_per_device": step.tflops_per_device(),
        "mfu": step.mfu(),
    }
    if estimate.tokens is not None:
        facts |= {"days": step.days(estimate.tokens), "device_hours": step.device_hours(estimate.tokens)}
    return facts


def _rank_as_json(rank: RankMemory) -> dict[str, Any]:
    return {
        "stage": rank.stage,
        "layers": rank.layers,
        "parameters": rank.num_parameters,
        **{
            f"{place}_bytes": {**getattr(rank, place)._asdict(), "total": getattr(rank, place).total}
            for place in ("device", "cpu", "nvme")
        },
    }


def _layers(rank: RankMemory) -> str:
    return ", ".join(
        f"{start} to {stop - 1}" if stop - 1 > start else f"{start}" for start, stop in rank.layers
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _count(number: float) -> str:
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.4g}{letter}"
    return f"{number:.0f}"
