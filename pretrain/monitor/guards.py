"""Two watchers over the loop: signals that ask for an orderly stop, and numbers that are not finite.

Engines do not step on gradients that are not finite, so the weights are still good when a step is found bad.
The step is then run again under hooks, with the same random streams, and the first layer whose output or
gradient is not finite is named with its rank.
"""

import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pretrain.engine.base import Engine, MicroBatch, StepResult
from pretrain.engine.groups import Groups

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
MAX_SKIPPED_IN_A_ROW = (
    50  # fp16: a loss scale that halves this often (2**16 -> below 1) finds no finite gradient
)


class StopSignal:
    """Notes SIGTERM and SIGUSR1; the loop asks between steps, all ranks together."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._has_stopped = False

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Handle the signals inside, and give them back afterwards.

        After an orderly stop they are ignored: on a slow host the signal may come when all is saved already.
        """
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self._has_stopped else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def asked(self, groups: Groups) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank."""
        self._has_stopped = groups.any_rank(self.received is not None)
        return self._has_stopped


def is_finite(result: StepResult) -> bool:
    """Whether the step's numbers are, and it was applied."""
    return math.isfinite(result.loss) and math.isfinite(result.grad_norm) and result.applied


class FiniteGuard:
    """Judges each step's result."""

    def __init__(self, *, is_fp16: bool):
        self._is_fp16 = is_fp16
        self._skipped_in_a_row = 0

    def objects(self, result: StepResult) -> bool:
        """Whether training must stop. fp16 skips single steps while its loss scale settles; that is no reason."""
        bad = not is_finite(result)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if bad else 0
        return bad and (not self._is_fp16 or self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW)


class Sighting(NamedTuple):
    """A tensor that is not finite; tuples sort by when it appeared."""

    phase: int  # 0: weights, 1: forward, 2: backward
    order: int  # of the layer in that phase
    rank: int
    what: str


@dataclass
class _Hunt:
    engine: Engine
    first: Sighting | None = None

    def note(self, phase: int, order: int, what: str) -> None:
        seen = Sighting(phase, order, self.engine.groups.rank, what)
        if self.first is None or seen < self.first:
            self.first = seen


def first_non_finite(engine: Engine, batches: Sequence[MicroBatch | None], seed: Callable[[], None]) -> str:
    """Run the step again and name the first tensor that is not finite; every rank calls it and gets the answer.

    ``seed`` puts the random streams where they were before the step.
    """
    hunt = _Hunt(engine)
    names = [layer.name for layer in engine.plan.layers]
    handles = []
    for layer in engine.layers:
        index = names.index(layer.plan.name)
        _look_at_weights(hunt, layer, index)
        handles.append(layer.module.register_forward_hook(_forward_hook(hunt, layer.plan.name, index)))
    try:
        seed()
        engine.train_step(batches)
    finally:
        for handle in handles:
            handle.remove()
    return _told(_earliest(hunt.first, engine.groups))


def _look_at_weights(hunt: _Hunt, layer: Any, index: int) -> None:
    for name, parameter in layer.module.named_parameters():
        if not _finite(parameter.detach()):
            hunt.note(0, index, f"weight {layer.plan.name}.{name}")


def _forward_hook(hunt: _Hunt, name: str, index: int) -> Callable[..., None]:
    def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        tensors = [output] if isinstance(output, torch.Tensor) else list(output)
        for tensor in tensors:
            if not tensor.is_floating_point():
                continue
            if not _finite(tensor.detach()):
                hunt.note(1, index, f"output of {name} in the forward pass")
            if tensor.requires_grad:
                tensor.register_hook(_gradient_hook(hunt, name, index))

    return look


def _gradient_hook(hunt: _Hunt, name: str, index: int) -> Callable[[torch.Tensor], None]:
    def look(gradient: torch.Tensor) -> None:
        if not _finite(gradient):
            hunt.note(2, -index, f"gradient of the output of {name} in the backward pass")

    return look


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _earliest(mine: Sighting | None, groups: Groups) -> Sighting | None:
    gathered: list[Sighting | None] = [None] * groups.layout.world_size
    dist.all_gather_object(gathered, mine)
    seen = [sighting for sighting in gathered if sighting is not None]
    return min(seen) if seen else None


def _told(sighting: Sighting | None) -> str:
    if sighting is None:
        return "run again, every layer's output was finite: a parameter's gradient overflows in the sum"
    return f"first not finite: {sighting.what}, on rank {sighting.rank}"
