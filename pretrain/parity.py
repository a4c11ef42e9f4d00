"""Does a layout compute what one process computes?  Traces of losses, norms, gradients and weights, compared.

A trace holds, for the first steps of a run: every step's loss and gradient norm, the whole model's gradients of the
first step, and the whole model's weights after the last.  Gradients and weights are in logical form (merged over
tensor ranks, collected over stages and shards), so that traces of any two layouts can be held side by side.
`megaloom parity` records one trace per layout with this program.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from safetensors import safe_open
from safetensors.torch import save_file

import model_providers.late_compile  # noqa: F401  # before megatron-core
from model_providers.logical import describe_parameter, is_routed_expert, merge
from pretrain.batches import Feed, open_run_data
from pretrain.config_io import Run
from pretrain.engine.base import Engine
from pretrain.engine.groups import Groups, join
from pretrain.engine.layers import tied_names
from pretrain.loop import begin_step
from pretrain.monitor import logs
from pretrain.program import add_run_words, exit_code, load_on_rank, rank_parser
from pretrain.run import check_place, make_engine, make_plan, settle_schedule

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Trace:
    """What one layout computed."""

    losses: list[float]
    grad_norms: list[float]
    gradients: Tensors  # of the first step, averaged over the batch, before clipping
    weights: Tensors  # after the last step


@dataclass(frozen=True)
class Comparison:
    """The largest relative differences of a trace from a reference."""

    loss: float
    grad_norm: float
    gradient: (
        float  # of any parameter: largest absolute difference over the reference's largest absolute value
    )
    gradient_name: str
    weights: float  # of all parameters together: norm of the difference over the reference's norm


def compare(trace: Trace, reference: Trace) -> Comparison:
    """How far ``trace`` is from ``reference``; the same parameters must be in both."""
    gradient, gradient_name = _furthest(trace.gradients, reference.gradients)
    return Comparison(
        loss=_relative(trace.losses, reference.losses),
        grad_norm=_relative(trace.grad_norms, reference.grad_norms),
        gradient=gradient,
        gradient_name=gradient_name,
        weights=_apart(trace.weights, reference.weights),
    )


def record(run: Run, steps: int) -> Trace | None:
    """Train ``steps`` steps and trace them; every rank calls it, rank 0 gets the trace."""
    groups = join(run.layout)
    logs.start(groups.rank)
    check_place(run, groups)
    data = open_run_data(run, groups)
    plan = make_plan(run, groups)
    run, groups = settle_schedule(run, plan, groups)
    engine = make_engine(run, plan, groups)
    feed = Feed(data.train, run, groups, consumed_samples=0)
    seen: list[Tensors] = []

    def look_once() -> None:
        if not seen:
            seen.append(whole_model(engine, safe_get_full_grad))

    engine.before_step(look_once)
    losses, norms = [], []
    for step in range(steps):
        begin_step(run, engine, step)
        result = engine.train_step(feed.next_step())
        losses.append(result.loss)
        norms.append(result.grad_norm)
    feed.close()
    weights = whole_model(engine, safe_get_full_fp32_param)
    return Trace(losses, norms, seen[0], weights) if groups.is_first else None


def whole_model(engine: Engine, read: Callable[[torch.nn.Parameter], torch.Tensor | None]) -> Tensors:
    """``read`` of every logical parameter of the model, on rank 0; collective, in layer order on each stage."""
    groups, skip = engine.groups, tied_names(engine.plan)
    mine: Tensors = {}
    for layer in engine.layers:
        for key, parameter in layer.module.named_parameters():
            name = f"{layer.plan.name}.{key}"
            if name not in skip:
                mine[name] = _merge_over_ranks(_read(read, parameter, engine), parameter, name, groups)
    if groups.place.dp or groups.place.tp:
        return {}
    return _collect_over_stages(mine, groups)


def _read(
    read: Callable[..., torch.Tensor | None], parameter: torch.nn.Parameter, engine: Engine
) -> torch.Tensor:
    """DeepSpeed's reader where an optimizer of its own holds the value, else the parameter's own."""
    if engine.deepspeed.zero_optimization():
        tensor = read(parameter)
    else:
        tensor = parameter.grad if read is safe_get_full_grad else parameter.detach()
    assert tensor is not None, "a parameter has no value to compare"
    return tensor.detach().float().cpu().clone().reshape(getattr(parameter, "ds_shape", parameter.shape))


def _merge_over_ranks(
    tensor: torch.Tensor, parameter: torch.nn.Parameter, name: str, groups: Groups
) -> torch.Tensor:
    """Of dense parameters over tensor ranks, of experts over all that hold a part of one copy of them."""
    place = groups.layout.tensor_place(groups.rank)
    group = groups.experts.copy if is_routed_expert(parameter) else groups.tp
    shares = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shares, tensor.contiguous(), group=group)
    share = torch.empty(tensor.shape)  # a sharded parameter's own shape is that of its shard
    for mark in ("tensor_model_parallel", "partition_dim", "partition_stride", "is_routed_expert"):
        if hasattr(parameter, mark):
            setattr(share, mark, getattr(parameter, mark))
    return merge(shares, describe_parameter(name, share, place), ep=place.ep)


def _collect_over_stages(mine: Tensors, groups: Groups) -> Tensors:
    gathered: list[Tensors | None] | None = [None] * groups.layout.pp if groups.place.pp == 0 else None
    dist.gather_object(mine, gathered, dst=dist.get_process_group_ranks(groups.pp)[0], group=groups.pp)
    return {name: tensor for stage in gathered or [] for name, tensor in (stage or {}).items()}


def _relative(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(ours, theirs, strict=True))


def _furthest(ours: Tensors, theirs: Tensors) -> tuple[float, str]:
    assert ours.keys() == theirs.keys(), f"parameters differ: {sorted(ours.keys() ^ theirs.keys())}"
    largest = max(float(tensor.abs().max()) for tensor in theirs.values())
    worst = (0.0, "")
    for name, reference in theirs.items():
        scale = max(float(reference.abs().max()), 1e-6 * largest)  # a gradient that is zero but for rounding
        worst = max(worst, (float((ours[name] - reference).abs().max()) / scale, name))
    return worst


def _apart(ours: Tensors, theirs: Tensors) -> float:
    """Parameters one by one would not do: where a gradient is zero but for rounding, as an attention's key bias is,
    Adam makes whole steps of the rounding.
    """
    assert ours.keys() == theirs.keys(), f"parameters differ: {sorted(ours.keys() ^ theirs.keys())}"
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return math.sqrt(difference / sum(float(tensor.double().square().sum()) for tensor in theirs.values()))


def write_trace(trace: Trace, path: Path) -> None:
    tensors = {f"gradient/{name}": tensor for name, tensor in trace.gradients.items()}
    tensors |= {f"weight/{name}": tensor for name, tensor in trace.weights.items()}
    tensors |= {"losses": torch.tensor(trace.losses, dtype=torch.float64)}
    tensors |= {"grad_norms": torch.tensor(trace.grad_norms, dtype=torch.float64)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_trace(path: Path) -> Trace:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict

    def part(kind: str) -> Tensors:
        return {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}

    return Trace(
        tensors["losses"].tolist(), tensors["grad_norms"].tolist(), part("gradient/"), part("weight/")
    )


def report(comparison: Comparison, tolerance: float) -> tuple[str, bool]:
    """A table of the differences, and whether they are within the tolerance."""
    rows = (
        ("loss, every step", comparison.loss, ""),
        ("gradient norm, every step", comparison.grad_norm, ""),
        ("gradient, first step", comparison.gradient, comparison.gradient_name),
        ("weights, last step", comparison.weights, ""),
    )
    # Adam makes whole steps of the rounding of gradients near zero, which norms show before losses do.
    limits = {"loss": tolerance, "grad_norm": 10 * tolerance, "gradient": 10 * tolerance}
    agrees = all(getattr(comparison, name) <= limit for name, limit in limits.items())
    agrees = agrees and not any(math.isnan(value) for _, value, _ in rows)
    lines = [f"{title:<26} {value:9.1e}  {name}" for title, value, name in rows]
    verdict = "the same" if agrees else "DIFFERENT"
    lines.append(
        f"{verdict}: relative tolerance {tolerance:g} on losses, {10 * tolerance:g} on norms and gradients"
    )
    return "\n".join(lines), agrees


def main(argv: list[str] | None = None) -> int:
    """``record OUT RUN key=value ... --steps N`` on every rank, or ``compare TRACE REFERENCE`` in one process."""
    parser = rank_parser("pretrain.parity", __doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    recording, comparing = commands.add_parser("record"), commands.add_parser("compare")
    recording.add_argument("out", type=Path)
    recording.add_argument("--steps", type=int, default=20)
    add_run_words(recording)
    comparing.add_argument("trace", type=Path)
    comparing.add_argument("reference", type=Path)
    comparing.add_argument("--tolerance", type=float, default=1e-5)
    words = parser.parse_args(argv)
    if words.what == "record":
        return exit_code("parity", lambda: record_to_file(words))
    text, agrees = report(compare(read_trace(words.trace), read_trace(words.reference)), words.tolerance)
    print(text)
    return 0 if agrees else 1


def record_to_file(words: argparse.Namespace) -> None:
    trace = record(load_on_rank(words), words.steps)
    if trace is not None:
        write_trace(trace, words.out)


if __name__ == "__main__":
    sys.exit(main())
