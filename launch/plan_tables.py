"""What `megaloom plan` tells of a search: a table for a reader, or a document for a program."""

from typing import Any, NamedTuple

from rich.table import Table

from launch import advice
from launch.planner import Candidate, Search, Task, lacks
from launch.time_tables import fp8_told
from model_providers.cost import parameters

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
    stated: dict[str, Any]  # sections that the plan does not decide
    steps: int
    lr: float
    advice: advice.Advice | None


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
    if step.scenario.fp8 is not None:
        lines.append(fp8_told(step))
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
    table = Table("", "layout", "s a step", "MFU", *(COLUMNS[name] for name in parts), "GiB", "lacks")
    for rank, each in enumerate(shown, start=1):
        seconds = [f"{each.step.parts[name]:.3g}" for name in parts]
        table.add_row(
            str(rank),
            title(each),
            f"{each.step.total_s:.4g}",
            f"{each.step.mfu():.1%}",
            *seconds,
            f"{each.memory.total_bytes / 2**30:.1f}",
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
    words += [f"loss x{scenario.chunk_tokens}"] * (scenario.chunk_tokens is not None)
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
        "recompute_modules": list(scenario.recompute_modules) if scenario.recompute == "selective" else [],
        "loss_chunk_tokens": scenario.chunk_tokens,
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
