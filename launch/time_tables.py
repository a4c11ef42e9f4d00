"""How a predicted step is told: its parts in a table, and in lines what follows from them."""

from rich.table import Table

from launch.layer_time import is_timed_by_flops
from launch.step_time import StepTime

GIB = 2**30

PARTS_TOLD = {
    "gemm_s": "matrix products",
    "attention_s": "attention",
    "memory_bound_s": "norms, activations and the like, by memory",
    "recompute_s": "recompute",
    "tensor_parallel_s": "tensor-parallel sums",
    "expert_parallel_s": "tokens to experts and back",
    "bubble_s": "pipeline bubble",
    "transfer_s": "messages between stages",
    "data_parallel_s": "gradients and weights between copies, unhidden",
    "optimizer_s": "optimizer",
    "offload_s": "copies to the host",
}


def time_table(step: StepTime) -> Table:
    """Seconds of a step by part."""
    device = step.cluster.device
    table = Table(
        "part", "seconds", "share", title=f"a step on {step.num_devices} x {device.name}, as predicted"
    )
    for name, seconds in step.parts.items():
        if seconds >= 0.0005 * step.total_s:
            table.add_row(PARTS_TOLD[name], f"{seconds:.4g}", f"{seconds / step.total_s:.1%}")
    table.add_section()
    table.add_row("a step", f"{step.total_s:.4g}", "")
    return table


def time_lines(step: StepTime, tokens: float | None) -> list[str]:
    """What follows from the step's time; ``tokens``: to train on, if that is known."""
    lines = [
        f"{step.tokens_per_s:,.0f} tokens/s, {step.tflops_per_device():.3g} TFLOP/s a device, MFU {step.mfu():.1%} "
        f"(causal attention counted by half; {step.mfu('full'):.1%} with all of it)",
        f"bubble {step.bubble_share:.1%} of the pipeline's time" if step.scenario.layout.pp > 1 else "",
        sent(step),
        fp8_told(step),
    ]
    if tokens is not None:
        days, hours = step.days(tokens), step.device_hours(tokens)
        lines.append(f"{tokens:.4g} tokens: {days:.3g} days, {hours:,.0f} device-hours")
    return [line for line in lines if line]


def fp8_told(step: StepTime) -> str:
    """Whose products a recipe is counted with, and where it saves no time."""
    fp8, device = step.scenario.fp8, step.cluster.device
    if fp8 is None:
        return ""
    if is_timed_by_flops(step.scenario.model):
        return f"fp8.recipe={fp8.recipe}: not in these seconds, which are those of {step.scenario.dtype}"
    if not device.fp8_flops_per_s(fp8.recipe):
        return f"fp8.recipe={fp8.recipe}: {device.name} has no such products; emulated they save no time"
    if fp8.backend == "torch":
        return (
            f"fp8.recipe={fp8.recipe}: by torch's products in such a run, counted without a gain: a step took longer "
            "with them than in bf16"
        )
    experts = "; routed experts as they are" if step.scenario.model.moe is not None else ""
    return f"fp8.recipe={fp8.recipe}: as fast as Transformer Engine's products{experts}"


def sent(step: StepTime) -> str:
    """What one device sends in a step, by link."""
    where = {"intra": "inside nodes", "inter": "between nodes", "host": "to its host"}
    told = [
        f"{kind} {sent_bytes / GIB:.3g} GiB {where.get(step.links.get(kind, ''), '')}".strip()
        for kind, sent_bytes in step.traffic._asdict().items()
        if sent_bytes and step.links.get(kind, "") != "none"
    ]
    return f"a device sends in a step: {', '.join(told)}" if told else ""
