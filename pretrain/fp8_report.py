"""The report that `megaloom fp8-report` prints: recipes, bits, sharpness, blocks, linears, and what follows."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch

from data_tools.loader import SampleSource
from model_providers.fp8.config import Fp8Config, Recipe
from pretrain.errors import RunError
from pretrain.fp8_picture import draw
from pretrain.fp8_trials import Blocks, Gradients, Linears, Outcome, Subject, apart, attempt, read
from pretrain.fp8_verdict import Report, as_dict, choose, verdict, worst_of
from pretrain.generate import Trained, load_trained
from pretrain.scoring import held_out_sets

ALL_BLOCKS = Fp8Config(recipe="current", bf16_first=0, bf16_last=0)
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
FP16_NOTE = "the run's format is fp16, with which FP8 does not go; bf16 stands for it here"
SWEEP = [(8, mantissa) for mantissa in range(7, 0, -1)] + [(e, m) for e in (5, 4) for m in (3, 2, 1)]
PLACEMENTS = [
    Blocks(0, 0),
    Blocks(0, 1),
    Blocks(1, 0),
    Blocks(1, 1),
    Blocks(0, 2),
    Blocks(2, 0),
    Blocks(2, 2),
]


class Told:
    """How far it is, on stderr, so that a page or JSON stays alone."""

    def __init__(self, num_trials: int):
        self.num_trials, self.done = num_trials, 0

    def trying(self, what: str) -> None:
        self.done += 1
        print(f"trial {self.done} of {self.num_trials}: {what}", file=sys.stderr, flush=True)


def report(words: argparse.Namespace) -> None:
    """Print what ``megaloom fp8-report`` was asked for (`launch.fp8_report` has the words)."""
    found = examine(words.checkpoint, words.recipes, num_samples=words.samples, corpus=words.data)
    if words.out is not None:
        draw(found, words.out)
    if words.json:
        print(json.dumps(as_dict(found)))
        return
    print("\n".join(page(found)))
    if words.out is not None:
        print(f"\n{words.out}")


def examine(path: Path, recipes: Sequence[str], *, num_samples: int, corpus: str | None = None) -> Report:
    """Try everything on one checkpoint."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(path, device, fp8=ALL_BLOCKS)
    name, source = next(iter(held_out_sets(trained, corpus).items()))
    now, before = numbers(source, num_samples)
    subject = Subject(trained, read(source, now, device), read(source, before, device))
    if not subject.linears:
        raise RunError(
            f"checkpoint={path}: this model has no linear layer that runs in FP8; nothing to report"
        )
    subject.use(lambda part: None)
    exact, loss, sharp = subject.gradients(subject.micro_batches)
    found = _begin(path, trained, subject, f"{len(now)} of {name}", Outcome(loss, sharpness=sharp))
    if found.wide != "fp32":
        held = load_trained(path, device, dtype=FORMATS[found.wide], fp8=ALL_BLOCKS)
        subject = Subject(held, subject.micro_batches, subject.earlier)
    _try_all(found, subject, exact, recipes)
    return found


def numbers(source: SampleSource, num_samples: int) -> tuple[list[int], list[int]]:
    """Samples to try on, and others before them where there are enough."""
    there = source.dataset.num_distinct_samples()
    now = list(range(min(num_samples, there)))
    before = [number for number in range(len(now), 2 * len(now)) if number < there]
    return now, before or now


def _begin(path: Path, trained: Trained, subject: Subject, samples: str, exact: Outcome) -> Report:
    config, names = trained.config, [part.scaling.name for part in subject.linears]
    stated = config.fp8 or Fp8Config(recipe="current")
    blocks = Blocks(stated.bf16_first, stated.bf16_last)
    if not subject.narrow(blocks):
        blocks = Blocks(0, 0)
    dtype = config.precision.dtype
    notes = [FP16_NOTE] if dtype == "fp16" else []
    if config.model.moe is not None and not stated.may_take_experts:
        notes.append(
            "routed experts stay in the run's own format, as the run says (fp8.experts, fp8.backend)"
        )
    return Report(
        checkpoint=str(path),
        samples=samples,
        wide="bf16" if dtype == "fp16" else dtype,
        blocks=blocks,
        num_narrow=len(subject.narrow(blocks)),
        num_linears=len(names),
        exact=exact,
        own=exact,
        notes=notes,
    )


def _try_all(found: Report, subject: Subject, exact: Gradients, recipes: Sequence[str]) -> None:
    subject.use(lambda part: None)
    own, own_loss, sharp = subject.gradients(subject.micro_batches)
    told = Told(len(recipes) + len(SWEEP) + sum(bool(subject.narrow(some)) for some in PLACEMENTS))
    found.own = Outcome(own_loss, 0.0, *apart(own, exact), sharp)
    blocks = found.blocks
    seen: dict[str, Linears] = {}
    for recipe in cast(Sequence[Recipe], recipes):
        told.trying(recipe)
        trial = attempt(
            subject, subject.with_recipe(recipe, blocks), exact=exact, own_loss=own_loss, look=True
        )
        found.recipes[recipe], seen[recipe] = trial.outcome, trial.linears
    for exponent, mantissa in SWEEP:
        told.trying(f"E{exponent}M{mantissa}")
        bits = subject.with_bits(exponent, mantissa, blocks)
        found.sweep[exponent, mantissa] = attempt(subject, bits, exact=exact, own_loss=own_loss).outcome
    stated = subject.trained.config.fp8
    found.chosen = choose(found.recipes, None if stated is None else stated.recipe)
    found.worst = worst_of(seen[found.chosen])
    for some in PLACEMENTS:
        if subject.narrow(some):
            told.trying(f"{found.chosen} without {some.first} and {some.last} blocks")
            choice = subject.with_recipe(cast(Recipe, found.chosen), some)
            found.placements[some] = attempt(subject, choice, exact=exact, own_loss=own_loss).outcome


def page(found: Report) -> Iterator[str]:
    """The report as text."""
    yield f"{found.checkpoint}: {found.samples}"
    yield f"{found.num_narrow} of {found.num_linears} linears in FP8: {found.blocks.words()}; others in {found.wide}"
    yield from (f"note: {note}" for note in found.notes)
    yield ""
    yield from table("recipe", {"fp32": found.exact, f"{found.wide} (own)": found.own, **found.recipes})
    yield "gap: of the loss, to the run's own format; gradients beside those of fp32; sharpness in per cent, of logits"
    yield ""
    yield from table("bits", {f"E{e}M{m}": outcome for (e, m), outcome in found.sweep.items()})
    yield ""
    yield from table(f"blocks, {found.chosen}", {some.words(): out for some, out in found.placements.items()})
    yield ""
    yield from worst_table(found)
    yield ""
    yield from verdict(found)


def table(title: str, rows: dict[str, Outcome]) -> Iterator[str]:
    width = max(len(title), *(len(name) for name in rows))
    yield f"{title:<{width}}  {'loss':>9} {'gap':>9} {'gradient error':>15} {'cosine':>8} {'sharpness':>10}"
    for name, out in rows.items():
        yield (
            f"{name:<{width}}  {out.loss:>9.5f} {_told(out.gap, '.4%'):>9} {_told(out.gradient_error, '.3%'):>15} "
            f"{_told(out.gradient_cosine, '.5f'):>8} {_told(out.sharpness, '.4f'):>10}"
        )


def worst_table(found: Report) -> Iterator[str]:
    width = max(len(loss.linear) for loss in found.worst)
    title = f"loses most under {found.chosen}"
    width = max(width, len(title))
    yield f"{title:<{width}}  {'operand':<8} {'clipped':>9} {'to zero':>9} {'error':>9} {'amax':>10}"
    for loss in found.worst:
        facts = loss.facts
        yield (
            f"{loss.linear:<{width}}  {loss.operand:<8} {facts.overflow:>9.3%} {facts.underflow:>9.3%} "
            f"{facts.error:>9.3%} {facts.amax:>10.3g}"
        )


def _told(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
