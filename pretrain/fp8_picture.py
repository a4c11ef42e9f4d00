"""A picture of a report on FP8: what the loss and the gradients lose with every mantissa bit, and by each recipe."""

import math
from pathlib import Path

from pretrain.fp8_verdict import SAFE_GAP, Report
from pretrain.plot import ACCENTS, INK, MUTED, plt, write

FLOOR = 1e-6  # relative: what is nearer than that is drawn there


def draw(report: Report, out: Path) -> None:
    """Left the loss's gap, right the gradient's error; lines by exponent bits, dashes by recipe."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), dpi=130, layout="constrained")
    for place, key, title in zip(
        axes, ("gap", "gradient_error"), ("gap of the loss", "error of the gradient"), strict=True
    ):
        place.set_xlabel("mantissa bits")
        place.set_ylabel(f"{title} (relative)")
        place.set_yscale("log")
        place.grid(color=MUTED, alpha=0.25, linewidth=0.6)
        place.spines[["top", "right"]].set_visible(False)
        _lines(place, report, key)
        _recipes(place, report, key)
        place.invert_xaxis()
    axes[0].axhline(SAFE_GAP, color=INK, linewidth=0.8, linestyle=":", label=f"{SAFE_GAP:.2%}")
    axes[1].legend(frameon=False, fontsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    write(figure, out)


def _lines(place, report: Report, key: str) -> None:  # type: ignore[no-untyped-def]
    exponents = sorted({exponent for exponent, _ in report.sweep}, reverse=True)
    for exponent, colour in zip(exponents, ACCENTS, strict=False):
        points = [(m, vars(outcome)[key]) for (e, m), outcome in report.sweep.items() if e == exponent]
        heights = [_height(value) for _, value in points]
        label = f"exponents of {exponent} bits"
        place.plot([m for m, _ in points], heights, "o-", color=colour, markersize=4, label=label)


def _height(value: float) -> float:
    """NaN, which is not drawn, stays what it is."""
    return value if math.isnan(value) else max(FLOOR, value)


def _recipes(place, report: Report, key: str) -> None:  # type: ignore[no-untyped-def]
    for number, (name, outcome) in enumerate(report.recipes.items()):
        height = _height(vars(outcome)[key])
        if math.isnan(height):
            name, height = f"{name}: not finite", FLOOR
        place.axhline(height, color=MUTED, linewidth=0.9, linestyle="--")
        place.annotate(
            name,
            (0.01 + 0.17 * number, height),
            xycoords=("axes fraction", "data"),
            fontsize=7,
            va="bottom",
            color=INK,
        )
