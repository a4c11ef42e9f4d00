"""What follows from a report on FP8, in two or three sentences with words of a run file.

A recipe passes where the loss lies within 0.25% of the run's own format's, which DeepSeek-V3 held throughout its
training (arXiv:2412.19437, section 3.3), and the gradient's direction within a cosine of 0.99, which is our own rule.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model_providers.fp8.config import RECIPES
from model_providers.fp8.scaling import Operand
from model_providers.fp8.tally import Facts
from pretrain.fp8_trials import Blocks, Outcome

SAFE_GAP = 0.0025
SAFE_COSINE = 0.99
WORST = 10  # operands that are told
MANY_CLIPPED, MANY_ZERO = 0.01, 0.5  # as the guard has it, fp8.guard
SCOPE = "This is about these weights: what small errors add up to in training, fp8.watch_every and shadow_every tell."


@dataclass(frozen=True)
class Loss:
    """Of one operand of one linear."""

    linear: str
    operand: Operand
    facts: Facts

    @property
    def largest(self) -> float:
        return max(self.facts.overflow, self.facts.underflow, self.facts.error)


@dataclass
class Report:
    """All that was tried."""

    checkpoint: str
    samples: str
    wide: str  # the run's own format
    blocks: Blocks
    num_narrow: int
    num_linears: int
    exact: Outcome
    own: Outcome
    recipes: dict[str, Outcome] = field(default_factory=dict)
    sweep: dict[tuple[int, int], Outcome] = field(default_factory=dict)  # by exponent and mantissa bits
    chosen: str = ""  # the recipe whose blocks and linears were looked at
    placements: dict[Blocks, Outcome] = field(default_factory=dict)
    worst: list[Loss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_safe(outcome: Outcome) -> bool:
    """NaN is not."""
    assert outcome.gap is not None and outcome.gradient_cosine is not None
    return outcome.gap <= SAFE_GAP and outcome.gradient_cosine >= SAFE_COSINE


def choose(recipes: Mapping[str, Outcome], own: str | None) -> str:
    """The run's own recipe if it passes, else the first that does, else the one with the least error."""
    passed = [name for name in RECIPES if name in recipes and is_safe(recipes[name])]
    if passed:
        return own if own in passed else passed[0]
    return max(recipes, key=lambda name: _or_worst(recipes[name].gradient_cosine))


def worst_of(linears: Mapping[str, Mapping[Operand, Facts]]) -> list[Loss]:
    every = [Loss(name, operand, facts) for name, seen in linears.items() for operand, facts in seen.items()]
    return sorted(every, key=lambda loss: -loss.largest)[:WORST]


def verdict(report: Report) -> list[str]:
    return [_of_recipes(report), _of_blocks(report), *_of_linears(report), *_of_bits(report), SCOPE]


def _of_recipes(report: Report) -> str:
    passed = [name for name in RECIPES if name in report.recipes and is_safe(report.recipes[name])]
    if not passed:
        best = report.recipes[report.chosen]
        return (
            f"No recipe is safe here: the nearest, {report.chosen}, moves the loss by {best.gap:.2%} (a limit of "
            f"{SAFE_GAP:.2%}) at a gradient's cosine of {best.gradient_cosine:.4f} ({SAFE_COSINE}); stay in "
            f"{report.wide}."
        )
    return (
        f"Safe here: {', '.join(passed)} (loss within {SAFE_GAP:.2%} of {report.wide}'s, gradient's cosine "
        f"{SAFE_COSINE} or more); fp8.recipe={report.chosen} is a good choice."
    )


def _of_blocks(report: Report) -> str:
    passed = [blocks for blocks, outcome in report.placements.items() if is_safe(outcome)]
    if not passed:
        return f"No choice of blocks at the ends that stay in {report.wide} makes {report.chosen} safe."
    least = min(passed, key=lambda blocks: (sum(blocks), report.placements[blocks].gradient_error))
    error, now = report.placements[least].gradient_error, report.recipes[report.chosen].gradient_error
    return (
        f"The fewest blocks in {report.wide} with which {report.chosen} is safe: {least.words()} (gradient error "
        f"{error:.2%}; {now:.2%} with {report.blocks.words()})."
    )


def _of_linears(report: Report) -> Iterable[str]:
    beyond = [
        loss
        for loss in report.worst
        if loss.facts.overflow > MANY_CLIPPED or loss.facts.underflow > MANY_ZERO
    ]
    if beyond:
        named = ", ".join(f"{loss.linear} ({loss.operand})" for loss in beyond[:3])
        yield f"Many numbers are clipped or become zero in {named}: the guard would take such linears out of FP8."


def _of_bits(report: Report) -> Iterable[str]:
    passed = [
        mantissa
        for (exponent, mantissa), outcome in report.sweep.items()
        if exponent == 8 and is_safe(outcome)
    ]
    if passed:
        yield f"Mantissa bits that are enough here, with exponents of 8 bits: {min(passed)}."
    else:
        yield "No number of mantissa bits from 7 down is enough here."


def _or_worst(value: float | None) -> float:
    return -1.0 if value is None or value != value else value


def as_dict(report: Report) -> dict[str, Any]:
    """For --json."""
    return {
        "checkpoint": report.checkpoint,
        "samples": report.samples,
        "format": report.wide,
        "blocks": report.blocks._asdict(),
        "linears": {"fp8": report.num_narrow, "all": report.num_linears},
        "fp32": vars(report.exact),
        "own": vars(report.own),
        "recipes": {name: vars(outcome) for name, outcome in report.recipes.items()},
        "sweep": [
            {"exponent": e, "mantissa": m, **vars(outcome)} for (e, m), outcome in report.sweep.items()
        ],
        "chosen": report.chosen,
        "placements": [
            {**blocks._asdict(), **vars(outcome)} for blocks, outcome in report.placements.items()
        ],
        "worst": [
            {"linear": loss.linear, "operand": loss.operand, **loss.facts._asdict()} for loss in report.worst
        ],
        "notes": report.notes,
        "verdict": verdict(report),
    }
