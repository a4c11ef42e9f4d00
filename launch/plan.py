"""`megaloom plan`: the fastest legal layout of a model on a cluster, why it won, and files to start it with.

Context parallelism is not planned, since this engine has none: long sequences are split over tp alone.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from launch import advice, plan_files
from launch.hardware import CLUSTERS, Cluster, cluster_named
from launch.planner import Candidate, Search, Task, lacks, search
from launch.run import positive
from model_providers.cost import parameters
from model_providers.presets import get_preset
from pretrain.config import Dtype, RunConfig, spelled_out
from pretrain.errors import RunError
from pretrain.run_file import plain, read_yaml

PIPED_WIDTH = 160
USUAL_BATCH_TOKENS = 4e6  # Touvron et al. 2023 (arXiv:2307.09288), section 2.2, for models of 7B to 70B
# What encoders are trained with, beside the next token of which decoders need no mention.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "bert": {"objective": {"kind": "mlm"}},
    "t5": {"objective": {"kind": "span_corruption"}},
}
COLUMNS = {
    "gemm_s": "matrices",
    "attention_s": "attention",
    "memory_bound_s": "memory",
    "recompute_s": "recompute",
    "tensor_parallel_s": "tp",
    "expert_parallel_s": "ep",
    "bubble_s": "bubble",
    "transfer_s": "messages",
    "data_parallel_s": "dp",
    "optimizer_s": "optimizer",
    "offload_s": "offload",
}


class Asked(NamedTuple):
    """The task, and what the run file should say of it."""

    task: Task
    model: dict[str, Any]
    steps: int
    lr: float
    advice: advice.Advice | None


def main(argv: list[str]) -> None:
    words = parser().parse_args(argv)
    asked = read(words)
    found = search(asked.task, top=words.top)
    command = None
    if words.out is not None:
        command = plan_files.write(
            words.out, asked.task, found.candidates[0], model=asked.model, steps=asked.steps, lr=asked.lr
        )
    if words.json:
        print(
            json.dumps(document(asked, found, top=words.top, tokens=words.tokens, command=command), indent=2)
        )
        return
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)
    for part in told(asked, found, top=words.top, tokens=words.tokens):
        console.print(part)
    if command is not None:
        console.print(
            f"written to {words.out}: {', '.join(sorted(each.name for each in words.out.iterdir()))}"
        )
        print(command)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom plan", description=__doc__, allow_abbrev=False)
    own.add_argument(
        "--model", metavar="NAME", help="a preset or a run file; without it, --tokens proposes one"
    )
    own.add_argument("--gpus", type=positive, help="devices in all")
    own.add_argument("--nodes", type=positive, help="instead of --gpus: nodes of --gpus-per-node devices")
    own.add_argument("--gpus-per-node", type=positive, help="devices of a node (default: the preset's)")
    own.add_argument(
        "--device", default="h100", metavar="NAME",
        help=f"{', '.join(CLUSTERS)}, or a .yaml or .json that describes a cluster (default: h100)",
    )  # fmt: skip
    own.add_argument("--tokens", type=float, help="to train on: gives days, learning rate and batch")
    own.add_argument("--sequence-length", type=positive, help="tokens of a sample (default: the model's)")
    batch = own.add_mutually_exclusive_group()
    batch.add_argument("--global-size", type=positive, help="samples of an optimizer step")
    batch.add_argument(
        "--global-batch-tokens", type=float, help="the same in tokens, rounded to what divides"
    )
    own.add_argument("--precision", choices=get_args(Dtype), default="bf16")
    own.add_argument("--corpus", default="data/corpus", metavar="PREFIX", help="for the run file")
    own.add_argument("--top", type=positive, default=10, help="layouts to show (default: 10)")
    own.add_argument(
        "--out", type=Path, metavar="DIR", help="write the run file, the DeepSpeed JSON and the command"
    )
    own.add_argument("--json", action="store_true", help="print a document instead of tables")
    return own


def read(words: argparse.Namespace) -> Asked:
    """The task that the words describe."""
    cluster = cluster_named(words.device, devices_per_node=words.gpus_per_node)
    num_devices = _num_devices(words, cluster)
    if words.tokens is not None:
        advice.check_tokens(words.tokens)
    if words.model is None and words.tokens is None:
        raise RunError("--model: give a preset or a run file, or --tokens=300e9 to have one proposed")
    name = words.model or advice.advise(words.tokens).nearest_preset
    raw, model = _document_of(name, words)
    config = _config(raw)
    given = advice.advise(words.tokens, config.model) if words.tokens is not None else None
    global_size = _global_size(words, config, num_devices, given)
    steps = config.train.steps
    if words.tokens is not None:
        steps = max(1, math.ceil(words.tokens / (global_size * config.data.sequence_length)))
    lr = config.optimizer.lr if given is None or _is_run_file(name) else float(f"{given.lr:.3g}")
    return Asked(Task(config, cluster, num_devices, global_size), model, steps, lr, given)


def _num_devices(words: argparse.Namespace, cluster: Cluster) -> int:
    if (words.gpus is None) == (words.nodes is None):
        raise RunError("--gpus: give the number of devices, or --nodes, one of them")
    num_devices: int = words.gpus or words.nodes * cluster.devices_per_node
    per_node = cluster.devices_per_node
    if num_devices > per_node and num_devices % per_node:
        near = sorted({num_devices // per_node * per_node, -(-num_devices // per_node) * per_node})
        raise RunError(
            f"--gpus={num_devices}: nodes have {per_node} devices each; use {' or '.join(map(str, near))}, or "
            "--gpus-per-node"
        )
    return num_devices


def _is_run_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _document_of(name: str, words: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run file's values, its model spelled out, and the model as the file to be written should state it."""
    if _is_run_file(name):
        raw = spelled_out(read_yaml(Path(name)))
        stated = dict(raw.get("model") or {})
        preset = stated.pop("preset", None)
        base = {} if preset is None else get_preset(str(preset)).model_dump()
        raw["model"] = {**base, **{key: value for key, value in stated.items() if value is not None}}
        shown = {"preset": preset, **stated} if preset is not None else stated
    else:
        known = get_preset(name)
        length = words.sequence_length or known.max_sequence_length
        raw = {
            "name": name,
            "model": known.model_dump(),
            "data": {"train": words.corpus, "sequence_length": length, **OBJECTIVES.get(known.family, {})},
            "train": {"steps": 1},
        }
        shown = {"preset": name}
    if words.sequence_length is not None:
        raw["data"] = {**raw.get("data", {}), "sequence_length": words.sequence_length}
    raw.setdefault("precision", {"dtype": words.precision})
    raw.pop("deepspeed", None)
    return raw, shown


def _config(raw: dict[str, Any]) -> RunConfig:
    try:
        config = RunConfig(**raw)
    except ValidationError as fault:
        raise RunError("; ".join(plain(fault))) from None
    if config.model.vocab_size is None:
        raise RunError(
            "model.vocab_size=null: a plan needs the number; state it, or choose a preset that has it"
        )
    return config


def _global_size(
    words: argparse.Namespace, config: RunConfig, num_devices: int, given: advice.Advice | None
) -> int:
    """As asked; else the run file's; else Step Law's or the usual one, rounded to what layouts divide."""
    length = config.data.sequence_length
    if words.global_size is not None:
        return int(words.global_size)
    if words.global_batch_tokens is not None:
        if not length <= words.global_batch_tokens <= 1e10:
            raise RunError(
                f"--global-batch-tokens={words.global_batch_tokens:g}: give at least one sample of {length} tokens, "
                "and at most 1e10"
            )
        return rounded(words.global_batch_tokens / length, num_devices)
    if config.batch.global_size is not None:
        return config.batch.global_size
    wanted = USUAL_BATCH_TOKENS if given is None else given.batch_tokens
    return rounded(wanted / length, num_devices)


def rounded(samples: float, num_devices: int) -> int:
    """The nearest odd part of ``num_devices`` times a power of 2, so that most numbers of copies divide it."""
    odd = num_devices
    while odd % 2 == 0:
        odd //= 2
    return int(odd * 2 ** max(0, round(math.log2(max(1.0, samples / odd)))))


def told(asked: Asked, found: Search, *, top: int, tokens: float | None) -> list[Table | str]:
    """What a reader sees, from the question to the answer."""
    task, best = asked.task, found.candidates[0]
    step = best.step
    size = parameters(task.model)
    lines: list[Table | str] = [
        f"{size / 1e9:.3g}B parameters, {task.num_devices} x {task.cluster.device.name} in nodes of "
        f"{task.cluster.devices_per_node}, {task.global_size} samples of {task.sequence_length} tokens a step",
        f"{found.num_layouts} layouts looked at: {found.num_illegal} are refused, {found.num_too_large} do not fit, "
        f"{len(found.candidates)} remain",
    ]
    if asked.advice is not None:
        lines += advised(asked.advice, asked.lr)
    lines.append(ranking(found, top=top))
    lines.append(why(best))
    if tokens is not None:
        lines.append(
            f"{tokens:.3g} tokens: {asked.steps} steps, {step.days(tokens):.3g} days, {step.device_hours(tokens):.4g} "
            "GPU-hours"
        )
    return lines


def advised(given: advice.Advice, lr: float) -> list[Table | str]:
    sizes = ", ".join(f"{number / 1e9:.3g}B ({law})" for law, number in given.optimal_parameters.items())
    return [
        f"compute-optimal for {given.num_tokens:.3g} tokens: {sizes}; the nearest preset is {given.nearest_preset}",
        f"Step Law (Li et al. 2025): learning rate {given.lr:.3g}, {given.batch_tokens:.3g} tokens a step; "
        f"the run file says {lr:g}",
        *(f"note: {caution}" for caution in given.cautions),
    ]


def ranking(found: Search, *, top: int) -> Table:
    """Seconds of a step by part; what each runner-up spends more on than the best."""
    shown = found.candidates[:top]
    parts = [
        name for name in COLUMNS if any(each.step.parts[name] >= 0.001 * each.step.total_s for each in shown)
    ]
    table = Table("", "layout", "s a step", "MFU", *(COLUMNS[name] for name in parts), "GB", "lacks")
    for rank, each in enumerate(shown, start=1):
        seconds = [f"{each.step.parts[name]:.3g}" for name in parts]
        table.add_row(
            str(rank),
            title(each),
            f"{each.step.total_s:.4g}",
            f"{each.step.mfu():.1%}",
            *seconds,
            f"{each.memory.total_bytes / 1e9:.0f}",
            "" if rank == 1 else lacking(shown[0], each),
        )
    return table


def title(candidate: Candidate) -> str:
    scenario, layout = candidate.scenario, candidate.scenario.layout
    words = [f"tp={layout.tp} pp={layout.pp} dp={layout.dp}"]
    words += [f"ep={layout.ep}" + (f" etp={layout.etp}" if layout.etp else "")] * (layout.ep > 1)
    if layout.pp > 1:
        words.append(scenario.schedule + (f" x{layout.chunks}" if layout.chunks > 1 else ""))
    words.append(f"zero{scenario.zero_stage} {scenario.micro_size}x{scenario.num_micro_batches}")
    words += [f"recompute={scenario.recompute}"] * (scenario.recompute != "none")
    words += [f"optimizer on {scenario.offload_optimizer}"] * (scenario.offload_optimizer != "none")
    words += [f"parameters on {scenario.offload_parameters}"] * (scenario.offload_parameters != "none")
    return " ".join(words)


def lacking(best: Candidate, other: Candidate) -> str:
    most = lacks(best.step, other.step)[:2]
    return ", ".join(f"{COLUMNS[name]} +{seconds / best.step.total_s:.1%}" for name, seconds in most)


def why(best: Candidate) -> str:
    """Where its time goes, and what it sends over which link."""
    step = best.step
    computing = step.gemm_s + step.attention_s + step.memory_bound_s
    where = {"intra": "in nodes", "inter": "between nodes"}
    sent = [
        f"{kind} {sent_bytes / 1e9:.3g} GB {where[step.links[kind]]}"
        for kind, sent_bytes in step.traffic._asdict().items()
        if sent_bytes and step.links.get(kind, "none") != "none"
    ]
    waits = beside_computing(step.parts)
    return (
        f"the best spends {computing / step.total_s:.1%} of a step computing"
        + (f", {waits}" if waits else "")
        + (f"; a device sends each step: {', '.join(sent)}" if sent else "")
        + f"; {step.tflops_per_device():.0f} TFLOP/s a device (causal attention counted by half, no recompute)"
    )


def beside_computing(parts: dict[str, float]) -> str:
    """The three largest parts that are no computing."""
    total = sum(parts.values())
    others = {
        name: value
        for name, value in parts.items()
        if name not in ("gemm_s", "attention_s", "memory_bound_s")
    }
    largest = sorted(others, key=lambda name: -others[name])[:3]
    return ", ".join(
        f"{parts[name] / total:.1%} {COLUMNS[name]}" for name in largest if parts[name] > 0.002 * total
    )


def document(
    asked: Asked, found: Search, *, top: int, tokens: float | None, command: str | None
) -> dict[str, Any]:
    """The same for a program, units in its keys."""
    best = found.candidates[0]
    answer: dict[str, Any] = {
        "num_devices": asked.task.num_devices,
        "device": asked.task.cluster.device.name,
        "global_size_samples": asked.task.global_size,
        "sequence_length_tokens": asked.task.sequence_length,
        "num_layouts": found.num_layouts,
        "num_illegal": found.num_illegal,
        "num_too_large": found.num_too_large,
        "layouts": [_as_facts(each) for each in found.candidates[:top]],
    }
    if tokens is not None and asked.advice is not None:
        answer |= {
            "steps": asked.steps,
            "days": best.step.days(tokens),
            "device_hours": best.step.device_hours(tokens),
            "optimal_parameters": asked.advice.optimal_parameters,
            "nearest_preset": asked.advice.nearest_preset,
            "step_law_lr": asked.advice.lr,
            "step_law_batch_tokens": asked.advice.batch_tokens,
            "cautions": list(asked.advice.cautions),
        }
    if command is not None:
        answer["command"] = command
    return answer


def _as_facts(candidate: Candidate) -> dict[str, Any]:
    scenario, step = candidate.scenario, candidate.step
    return {
        "layout": scenario.layout.model_dump(),
        "schedule": scenario.schedule,
        "zero_stage": scenario.zero_stage,
        "micro_size_samples": scenario.micro_size,
        "num_micro_batches": scenario.num_micro_batches,
        "recompute": scenario.recompute,
        "offload_optimizer": scenario.offload_optimizer,
        "offload_parameters": scenario.offload_parameters,
        "step_s": step.total_s,
        "parts": step.parts,
        "bubble_share": step.bubble_share,
        "traffic_bytes": step.traffic._asdict(),
        "links": step.links,
        "mfu": step.mfu(),
        "tflops_per_device": step.tflops_per_device(),
        "memory_bytes": candidate.memory.total_bytes,
        "memory_limit_bytes": candidate.memory.limit_bytes,
    }
