"""`layout.schedule: auto`: measure the layers and a message where the run is going to work, simulate, choose.

Every rank times each kind of layer once it is warm, one whole model's worth at most in memory: a block, the embedding,
the final norm and the head.  The ranks' mean is what the simulator is given, so all come to the same choice.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from model_providers import weight_gradients
from model_providers.layer_plan import LayerPlan, PlannedLayer, Wire
from pretrain import config_rules
from pretrain.config_io import Run
from pretrain.engine.groups import Groups
from pretrain.engine.messages import as_list, with_gradient
from pretrain.engine.schedules.catalogue import SCHEDULES
from pretrain.engine.schedules.ops import Placement
from pretrain.engine.schedules.simulate import Times
from pretrain.engine.schedules.streams import MODES, Mode, makespan
from pretrain.engine.schedules.transfers import lower
from pretrain.errors import RunError

REPEATS = 3
CLOSE = 1.01  # a schedule that is slower by no more than this, and holds less, is the better one
MOST_CHUNKS = 4


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer for one micro-batch."""

    forward: float
    input_gradient: float
    weight_gradient: float


@dataclass(frozen=True)
class Candidate:
    """A schedule with what it is expected to take."""

    schedule: str
    chunks: int
    messages: Mode
    step_s: float
    live: float  # most activations on any rank, in micro-batches of a rank's layers

    @property
    def title(self) -> str:
        chunks = f", {self.chunks} chunks" if self.chunks > 1 else ""
        passes = f"about {1e3 * self.step_s:.0f} ms for a step's passes"
        return f"{self.schedule}{chunks}: {passes}, {self.live:.3g} micro-batches held"


def measure(
    plan: LayerPlan, inputs: Wire, groups: Groups, targets: Sequence[torch.Tensor] = ()
) -> tuple[list[LayerTimes], float]:
    """Times of all layers of the plan, and of one message of activations; the mean over ranks; collective.

    A head that makes its loss is timed with it, of ``targets``.
    """
    by_kind: dict[str, LayerTimes] = {}
    value = inputs
    message: torch.Tensor | None = None
    for layer in plan.layers:
        if _kind(layer) not in by_kind:
            told = targets if plan.head_makes_loss and layer is plan.layers[-1] else ()
            by_kind[_kind(layer)], value = _time_layer(layer, value, groups, told)
            message = as_list(value)[0] if message is None else message
    assert message is not None
    numbers = [t for times in by_kind.values() for t in vars(times).values()]
    mean = torch.tensor([*numbers, _time_message(message, groups)], dtype=torch.float64, device=groups.device)
    dist.all_reduce(mean)
    shared = (mean / groups.layout.world_size).tolist()
    means = {kind: LayerTimes(*shared[3 * i : 3 * i + 3]) for i, kind in enumerate(by_kind)}
    return [means[_kind(layer)] for layer in plan.layers], shared[-1]


def _kind(layer: PlannedLayer) -> str:
    """Blocks of one stack and of equal cost take equal times: dense ones, or those with experts."""
    stack = layer.name.split(".")[0]
    is_block = layer.checkpointable and stack != "mtp"  # each of those adds to what the head is given
    return f"{stack} of {layer.cost.parameters}" if is_block else layer.name


def _time_layer(layer: PlannedLayer, value, groups: Groups, targets):  # type: ignore[no-untyped-def]
    """Forward and both backward halves of one layer, and its output for the next."""
    module = layer.build()
    best = [float("inf")] * 3
    for _ in range(REPEATS):
        inputs = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in as_list(value)]
        wire = inputs[0] if isinstance(value, torch.Tensor) else tuple(inputs)
        outputs: list[torch.Tensor] = []

        with weight_gradients.may_wait():
            run = partial(_fill, outputs, module, wire, targets)
            times = [_seconds(run, groups)]
        ends = [output for output in with_gradient(outputs) if output.requires_grad]
        ones = [torch.ones_like(end) for end in ends]
        with weight_gradients.put_aside() as store:
            times.append(_seconds(partial(torch.autograd.backward, ends, ones), groups))
        times.append(_seconds(partial(store.compute, lambda parameter, gradient: None), groups))
        best = [min(pair) for pair in zip(best, times, strict=True)]
    result = tuple(output.detach() for output in outputs)
    return LayerTimes(*best), result[0] if len(result) == 1 else result


def _fill(outputs: list[torch.Tensor], module: Any, wire: Wire, targets: Sequence[torch.Tensor]) -> None:
    outputs.extend(as_list(module(wire, *targets)))


def _time_message(tensor: torch.Tensor, groups: Groups) -> float:
    """One way between neighbouring stages: half of there and back."""
    ranks, stage = dist.get_process_group_ranks(groups.pp), groups.place.pp
    partner = stage ^ 1
    if partner >= len(ranks):
        return 0.0
    box = torch.empty_like(tensor)

    def there_and_back() -> None:
        steps = [(dist.send, tensor.detach().contiguous()), (dist.recv, box)]
        for verb, what in steps if stage < partner else reversed(steps):
            verb(what, ranks[partner], group=groups.pp)

    there_and_back()
    return min(_seconds(there_and_back, groups) for _ in range(REPEATS)) / 2


def _seconds(work: Callable[[], object], groups: Groups) -> float:
    started_s = time.perf_counter()
    work()
    if groups.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def candidates(
    run: Run,
    layers: list[LayerTimes],
    transfer_s: float,
    *,
    on_nccl: bool,
    only: Mapping[str, Any] | None = None,
) -> list[Candidate]:
    """All schedules that fit the run, the best first; if ``only`` is given, those in that placement of a checkpoint."""
    modes = MODES[:3] if on_nccl else MODES[:1]  # gloo's messages never wait for each other
    found = [
        _expected(placed, mode, layers, transfer_s)
        for placed in _that_fit(run)
        if only is None or only.items() <= placement_facts(placed).items()
        for mode in modes
    ]
    if not found:
        raise RunError(
            "layout.schedule=auto: no schedule has the checkpoint's chunks; name the one it was written with"
        )
    fastest = min(found, key=lambda candidate: candidate.step_s)
    within = [candidate for candidate in found if candidate.step_s <= CLOSE * fastest.step_s]
    chosen = min(within, key=lambda candidate: (candidate.live, candidate.step_s))
    return [chosen, *sorted((c for c in found if c is not chosen), key=lambda candidate: candidate.step_s)]


def placement_facts(run: Run) -> dict[str, Any]:
    """Where layers lie, in a checkpoint's words."""
    return {"chunks": run.layout.chunks, "placement": run.layout.placement}


def _that_fit(run: Run) -> Iterator[Run]:
    for name, family in SCHEDULES.items():
        for chunks in {"one": [1], "two": [2], "many": range(2, MOST_CHUNKS + 1)}[family.chunks]:
            placed = settled(run, name, chunks)
            if not config_rules.faults(placed):
                yield placed


def _expected(run: Run, mode: Mode, layers: list[LayerTimes], transfer_s: float) -> Candidate:
    name, layout, bounds = run.config.layout.schedule, run.layout, run.stage_bounds

    def of(part: str) -> tuple[float, ...]:
        return tuple(sum(getattr(layer, part) for layer in layers[a:b]) for a, b in pairwise(bounds))

    times = Times(of("forward"), of("input_gradient"), of("weight_gradient"), transfer=transfer_s)
    placement = Placement(layout.pp, layout.chunks, layout.placement)
    schedule = SCHEDULES[name].make(placement, run.num_micro_batches)
    step_s = makespan(lower(schedule, times), mode, times)
    return Candidate(name, layout.chunks, mode, step_s, max(schedule.max_live) / layout.chunks)


def settled(run: Run, schedule: str, chunks: int, messages: str | None = None) -> Run:
    """The run with a choice in place of `auto`."""
    wishes = run.config.layout.model_copy(
        update={"schedule": schedule, "chunks": chunks, "messages": messages or run.config.layout.messages}
    )
    layout = run.layout.model_copy(update={"chunks": chunks, "placement": SCHEDULES[schedule].style})
    return replace(run, config=run.config.model_copy(update={"layout": wishes}), layout=layout)
