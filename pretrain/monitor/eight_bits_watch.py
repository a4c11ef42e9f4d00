"""What eight bits lose, told beside the loss, and a guard that takes linears, or all of them, out of FP8.

Every ``fp8.watch_every`` steps each FP8 linear's operands are counted over all micro-batches and ranks; every
``fp8.shadow_every`` steps the batch at hand is evaluated with FP8 and without.  What the guard decides depends on
numbers that all ranks have, so that all decide alike; it stays in the scalings' state, and so in checkpoints.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch.distributed as dist

from model_providers.fp8.config import Fp8Config, GuardConfig
from model_providers.fp8.scaling import Operand, Scaling
from model_providers.fp8.tally import OPERANDS, Facts, facts_of
from pretrain.engine.base import Engine, MicroBatch, StepResult
from pretrain.engine.eight_bits import Row
from pretrain.monitor.experts import drop_notes
from pretrain.monitor.guards import is_finite
from pretrain.monitor.timers import due

T = TypeVar("T")

log = logging.getLogger(__name__)

SHADOW_MICRO_BATCHES = 2  # of each rank: as the first ones of a step, they cost two forward passes each


class EightBitsWatch:
    """Of a run; every rank has one and calls the same of it.  ``wide``: the run's own format, as it is told."""

    def __init__(self, engine: Engine, facts: Fp8Config, *, micro_size: int, wide: str):
        self.engine, self.facts, self._micro_size, self._wide = engine, facts, micro_size, wide
        self._linears = engine.deepspeed.eight_bits
        self.names = self._over_stages([scaling.name for scaling in self._linears.scalings])
        self.barred = self._all_barred()
        if not self.names and engine.groups.is_first:
            log.info(
                "the FP8 linears are Transformer Engine's: what they lose is not told, and no guard is on"
            )

    def begin(self, step: int) -> None:
        """Before optimizer step ``step`` (0 is the first ever)."""
        if due(step + 1, self.facts.watch_every):
            self._linears.begin_look()

    def has_looked(self, done: int) -> bool:
        """Whether there is something to tell after ``done`` steps."""
        return due(done, self.facts.watch_every) or due(done, self.facts.shadow_every)

    def wants_again(self, step: int, result: StepResult) -> bool:
        """Whether a step that is not finite should be tried without FP8."""
        guard = self.facts.guard
        return guard is not None and guard.retry and not is_finite(result) and self._is_on(step)

    def again(self, step: int, batches: Sequence[MicroBatch | None], failed: StepResult) -> StepResult:
        """The step without FP8, which is left for good if that helped."""
        drop_notes(self.engine)
        with self._linears.paused():
            result = self.engine.train_step(batches)
        if is_finite(result):
            self._bar_all(
                f"step {step + 1}: loss {failed.loss}, gradient norm {failed.grad_norm} with FP8, and finite numbers "
                f"without it"
            )
        return result

    def end(self, step: int, batches: Sequence[MicroBatch | None]) -> dict[str, float]:
        """What to record after step ``step``, on rank 0 all of it."""
        done = step + 1
        values: dict[str, float] = {}
        if due(done, self.facts.watch_every):
            values |= self._look(done)
        if due(done, self.facts.shadow_every) and self._is_on(step):
            values |= self._shadow(done, batches)
        if self.names:
            values["fp8/barred"] = float(len(self.barred))
        return values

    def _look(self, done: int) -> dict[str, float]:
        rows = self._linears.end_look()
        guard = self.facts.guard
        if guard is not None:
            by_name = {scaling.name: scaling for scaling in self._linears.scalings}
            found = [self._judge(by_name[row.name], row.facts(), guard) for row in rows]
            self._tell(f"step {done}: {line}" for line in self._over_stages([line for line in found if line]))
            self.barred = self._all_barred()
        return told(self._over_stages(rows))

    def _judge(self, scaling: Scaling, facts: Mapping[Operand, Facts], guard: GuardConfig) -> str | None:
        """A line if the linear is taken out now."""
        if scaling.is_barred or not facts:
            return None
        if (
            scaling.facts.recipe == "nvfp4"
        ):  # rounds gradients at random: those that become zero are right on average
            facts = {operand: seen for operand, seen in facts.items() if operand != "gradient"}
        fault = beyond(facts, guard)
        scaling.strikes = 0 if fault is None else scaling.strikes + 1
        if fault is None or scaling.strikes < guard.strikes:
            return None
        self._linears.bar([scaling.name])
        return f"{scaling.name} goes back to {self._wide} for good: {fault}, on {guard.strikes} watched steps in a row"

    def _shadow(self, done: int, batches: Sequence[MicroBatch | None]) -> dict[str, float]:
        """The relative difference that FP8 makes to the loss, without dropout."""
        some = batches[:SHADOW_MICRO_BATCHES]
        narrow = self.engine.eval_step(some, micro_size=self._micro_size)
        with self._linears.paused():
            wide = self.engine.eval_step(some, micro_size=self._micro_size)
        self.engine.timers.take()  # what this took belongs to no step
        gap = abs(narrow - wide) / abs(wide) if wide else 0.0
        guard = self.facts.guard
        if guard is not None and self.engine.groups.any_rank(not gap <= guard.gap):
            self._bar_all(
                f"step {done}: FP8 moves the loss from {wide:.4f} to {narrow:.4f}, by more than "
                f"fp8.guard.gap={guard.gap:g}"
            )
        return {"fp8/gap": gap}

    def _is_on(self, step: int) -> bool:
        return step >= self.facts.start_step and len(self.barred) < len(self.names)

    def _bar_all(self, why: str) -> None:
        self._linears.bar(self.names)
        self.barred = self._all_barred()
        self._tell([f"{why}: the run goes back to {self._wide} for good"])

    def _all_barred(self) -> list[str]:
        return self._over_stages([scaling.name for scaling in self._linears.scalings if scaling.is_barred])

    def _over_stages(self, here: list[T]) -> list[T]:
        """Those of all stages, in the stages' order; the same on every rank."""
        groups = self.engine.groups
        gathered: list[list[T]] = [[] for _ in range(groups.layout.pp)]
        dist.all_gather_object(gathered, here, group=groups.pp)
        return [one for stage in gathered for one in stage]

    def _tell(self, lines: Iterable[str]) -> None:
        for line in lines:
            if self.engine.groups.is_first:
                log.warning("%s", line)


def beyond(facts: Mapping[Operand, Facts], guard: GuardConfig) -> str | None:
    """Which operand loses more than the guard allows, in words; None if all is well."""
    for operand, seen in facts.items():
        if seen.overflow > guard.overflow:
            return f"{seen.overflow:.2%} of its {operand} are clipped (fp8.guard.overflow={guard.overflow:g})"
        if seen.underflow > guard.underflow:
            return (
                f"{seen.underflow:.2%} of its {operand} become zero (fp8.guard.underflow={guard.underflow:g})"
            )
    return None


def told(rows: Sequence[Row]) -> dict[str, float]:
    """Every linear's facts, and each operand's over the whole model."""
    values: dict[str, float] = {}
    for row in rows:
        for operand, seen in row.facts().items():
            values |= {f"fp8/{row.name}/{operand}/{key}": value for key, value in seen._asdict().items()}
    for number, operand in enumerate(OPERANDS):
        sums = [sum(column) for column in zip(*(row.sums[number] for row in rows), strict=True)]
        peaks = [max(column) for column in zip(*(row.peaks[number] for row in rows), strict=True)]
        seen_of_all = facts_of(sums, peaks) if sums else None
        if seen_of_all is not None:
            values |= {f"fp8/{operand}/{key}": value for key, value in seen_of_all._asdict().items()}
    return values
