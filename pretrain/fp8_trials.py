"""A trained model's loss and gradients under other number formats, on the same held-out samples, in one process.

One model serves for all trials: its blocks are built with FP8 linears throughout, and each trial says which scaling
every linear gets, or none.  Gradients are summed in fp32 and compared one by one, so that two are in memory at a time.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from data_tools.loader import SampleSource
from model_providers.building import solo_groups
from model_providers.fp8.config import Fp8Config, Recipe
from model_providers.fp8.linears import Follows
from model_providers.fp8.scaling import Operand, Scaling
from model_providers.fp8.simulated import SimulatedScaling
from model_providers.fp8.tally import OPERANDS, Facts, Tally, facts_of
from model_providers.layout import Layout
from model_providers.random_streams import begin_micro_batch
from pretrain.batches import to_device
from pretrain.engine.base import MicroBatch
from pretrain.generate import Trained
from pretrain.sharpness import sharpness, worst_losses

Gradients = list[torch.Tensor]  # fp32, of each parameter
Linears = dict[str, dict[Operand, Facts]]  # by a linear's name
Choose = Callable[[Follows], Scaling | None]  # None: the format of the rest of the model


class Alone(NamedTuple):
    """A single process, as `to_device` asks for it."""

    device: torch.device
    layout: Layout = Layout(tp=1, pp=1, dp=1)
    dp: Any = None


def read(source: SampleSource, numbers: Sequence[int], device: torch.device) -> list[MicroBatch]:
    """These samples, a few at a time; every micro-batch has equally many, as the weights ask for."""
    size = next(size for size in (4, 2, 1) if len(numbers) % size == 0)
    some = [source.batch(numbers[first : first + size]) for first in range(0, len(numbers), size)]
    return to_device(some, Alone(device))


class Blocks(NamedTuple):
    """Which blocks stay in the run's own format, at each end of a stack."""

    first: int
    last: int

    def words(self) -> str:
        return f"fp8.bf16_first={self.first} fp8.bf16_last={self.last}"


@dataclass(frozen=True)
class Outcome:
    """Of one trial; ``None`` where nothing was there to compare with, or the model has no logits over words."""

    loss: float
    gap: float | None = None  # relative, to the run's own format
    gradient_error: float | None = None  # norm of the difference from full precision's, over the norm of that
    gradient_cosine: float | None = None  # with full precision's
    sharpness: float | None = None  # per cent


@dataclass
class Subject:
    """A model in one number format, and the samples that it is tried on."""

    trained: Trained
    micro_batches: Sequence[MicroBatch]
    earlier: Sequence[MicroBatch]  # other samples, from which past scales are learnt

    @cached_property
    def linears(self) -> list[Follows]:
        return [
            part for layer in self.trained.layers for part in layer.modules() if isinstance(part, Follows)
        ]

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Each once, tied or not."""
        every = (parameter for layer in self.trained.layers for parameter in layer.parameters())
        return list(dict.fromkeys(every))

    @cached_property
    def depths(self) -> dict[str, int]:
        """Blocks of each stack."""
        places = [block_of(part.scaling.name) for part in self.linears]
        return {stack: max(index for other, index in places if other == stack) + 1 for stack, _ in places}

    def is_narrow(self, name: str, blocks: Blocks) -> bool:
        stated = self.trained.config.fp8
        if ".experts." in name and stated is not None and not stated.may_take_experts:
            return False
        stack, index = block_of(name)
        facts = Fp8Config(recipe="current", bf16_first=blocks.first, bf16_last=blocks.last)
        return facts.is_fp8_block(index, self.depths[stack])

    def narrow(self, blocks: Blocks) -> list[str]:
        """Names of the linears that run in eight bits."""
        return [part.scaling.name for part in self.linears if self.is_narrow(part.scaling.name, blocks)]

    def use(self, choose: Choose) -> None:
        """From now on every linear has the scaling that ``choose`` makes for it."""
        for part in self.linears:
            made = choose(part)
            name, part.scaling = part.scaling.name, made or wide(part)
            part.scaling.name = name

    def with_recipe(self, recipe: Recipe, blocks: Blocks) -> Choose:
        facts = Fp8Config(recipe=recipe, experiment=True)

        def choose(part: Follows) -> Scaling | None:
            is_narrow = self.is_narrow(part.scaling.name, blocks)
            return scaling_of(part, facts) if is_narrow else None

        return choose

    def with_bits(self, exponent_bits: int, mantissa_bits: int, blocks: Blocks) -> Choose:
        bits = {"exponent_bits": exponent_bits, "mantissa_bits": mantissa_bits}

        def choose(part: Follows) -> Scaling | None:
            is_narrow = self.is_narrow(part.scaling.name, blocks)
            return SimulatedScaling(solo_groups().tp, cut=part.cut, **bits) if is_narrow else None

        return choose

    def learn_past_scales(self) -> None:
        """Where scales come from past steps, let there have been one."""
        histories = [
            part.scaling.history
            for part in self.linears
            if part.scaling.is_on and part.scaling.history is not None
        ]
        if histories:
            self.gradients(self.earlier)
        for history in histories:
            history.roll(history.seen)

    def gradients(self, micro_batches: Sequence[MicroBatch]) -> tuple[Gradients, float, float | None]:
        """Of the mean loss, which comes next, and the sharpness."""
        total: Gradients = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]
        loss, largest = 0.0, 0.0
        for number, batch in enumerate(micro_batches):
            begin_micro_batch(number)  # what is rounded at random has its own numbers in each
            output = self._forward(batch)
            largest += self._largest(output, batch)
            part = self.trained.plan.loss(output, batch.targets)
            loss += float(part.detach())
            found = torch.autograd.grad(part, self.parameters, allow_unused=True)
            for held, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    held += gradient / len(micro_batches)
        count = len(micro_batches)
        is_told = math.isfinite(largest)
        return total, loss / count, sharpness(loss / count, largest / count) if is_told else None

    def _forward(self, batch: MicroBatch) -> Any:
        value: Any = batch.inputs
        for layer in self.trained.layers:
            value = layer(value)
        return value

    def _largest(self, output: Any, batch: MicroBatch) -> float:
        """The mean of the tokens' largest losses, weighted as the loss is; NaN if no words are asked for."""
        if self.trained.config.model.electra is not None:
            return math.nan
        logits = output if isinstance(output, torch.Tensor) else output[0]
        labels, weights = batch.targets[:2]
        worst = worst_losses(logits[..., : self.trained.config.model.known_vocab_size], labels.t())
        return float((worst * weights.t()).sum())


def wide(part: Follows) -> Scaling:
    """One that lets the linear run in the format of the rest."""
    scaling = scaling_of(part, part.facts)
    scaling.is_barred = True
    return scaling


def scaling_of(part: Follows, facts: Fp8Config) -> Scaling:
    return Scaling(facts, solo_groups().tp, cut=part.cut, num_experts=part.num_experts)


def block_of(name: str) -> tuple[str, int]:
    """'layers.3.mlp.linear_fc1' -> ('layers', 3)"""
    found = re.match(r"(.*?)\.(\d+)\.", name)
    assert found is not None, f"{name}: linears in FP8 lie in blocks"
    return found[1], int(found[2])


class Trial(NamedTuple):
    """What came of one, and what was seen of each linear."""

    outcome: Outcome
    linears: Linears


def attempt(
    subject: Subject, choose: Choose, *, exact: Gradients, own_loss: float, look: bool = False
) -> Trial:
    """Loss and gradients under one choice, beside full precision's gradients and the run's own format's loss."""
    subject.use(choose)
    subject.learn_past_scales()
    tallies = {}
    for part in subject.linears if look else []:
        part.scaling.look = tallies[part.scaling.name] = Tally(part.scaling, subject.trained.device)
    found, loss, sharp = subject.gradients(subject.micro_batches)
    error, cosine = apart(found, exact)
    outcome = Outcome(loss, abs(loss - own_loss) / own_loss, error, cosine, sharp)
    return Trial(outcome, {name: facts for name, tally in tallies.items() if (facts := seen(tally))})


def seen(tally: Tally) -> dict[Operand, Facts]:
    rows = zip(OPERANDS, tally.sums.tolist(), tally.peaks.tolist(), strict=True)
    found = {operand: facts_of(sums, peaks) for operand, sums, peaks in rows}
    return {operand: facts for operand, facts in found.items() if facts is not None}


def apart(ours: Gradients, exact: Gradients) -> tuple[float, float]:
    """Norm of the difference over the norm of ``exact``, and the cosine between the two."""
    difference = _dot((one - other, one - other) for one, other in zip(ours, exact, strict=True))
    ours_squared, squared = _dot(zip(ours, ours, strict=True)), _dot(zip(exact, exact, strict=True))
    product = _dot(zip(ours, exact, strict=True))
    norms = math.sqrt(ours_squared * squared)
    return math.sqrt(difference / squared), product / norms if norms else math.nan


def _dot(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return sum(float(torch.sum(one.double() * other.double())) for one, other in pairs)
