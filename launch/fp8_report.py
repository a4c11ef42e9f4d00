"""`megaloom fp8-report CHECKPOINT`: what FP8 and fewer bits do to a trained model's loss and gradients, in one process.

Every recipe on held-out samples; the operands of all linears with fewer and fewer bits; how sharp the loss is; which
linears lose most; and which words of a run file follow from it.
"""

import argparse
from pathlib import Path

from launch.env import for_this_process
from model_providers.fp8.config import RECIPES
from pretrain.checkpoint import store
from pretrain.errors import RunError

PICTURES = (".png", ".svg", ".pdf")


def main(argv: list[str]) -> None:
    words = parser().parse_args(argv)
    check(words)
    store.wanted(words.checkpoint, key="checkpoint")
    for_this_process()
    from pretrain.fp8_report import report  # torch and megatron-core, several seconds

    report(words)


def check(words: argparse.Namespace) -> None:
    """Refuse what cannot be meant."""
    if words.samples < 1:
        raise RunError(f"--samples={words.samples}: must be 1 or more")
    unknown = [recipe for recipe in words.recipes if recipe not in RECIPES]
    if unknown:
        raise RunError(f"--recipes={unknown[0]}: unknown; there are {', '.join(RECIPES)}")
    if words.out is not None and words.out.suffix not in PICTURES:
        raise RunError(f"--out={words.out}: a picture's name ends in {', '.join(PICTURES)}")


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom fp8-report", description=__doc__, allow_abbrev=False)
    own.add_argument("checkpoint", type=Path, help="a run's folder, or one checkpoint's")
    own.add_argument("--samples", type=int, default=16, help="held-out samples (default: 16)")
    own.add_argument(
        "--recipes",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=list(RECIPES),
        metavar="A,B",
        help=f"of {', '.join(RECIPES)} (default: all)",
    )
    own.add_argument("--data", metavar="PREFIX", help="a whole corpus instead of the run's held-out sets")
    own.add_argument("--json", action="store_true", help="one line of JSON")
    own.add_argument("--out", type=Path, metavar="FILE", help="draw the sweep of bits: .png, .svg or .pdf")
    return own
