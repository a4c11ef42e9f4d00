"""`megaloom fill CHECKPOINT --text "a [MASK] story"`: what a trained encoder puts in place of masked words.

Words are checked here, before torch is imported.
"""

import argparse
from pathlib import Path

from pretrain.checkpoint import store
from pretrain.errors import RunError


def main(argv: list[str]) -> None:
    words = parser().parse_args(argv)
    if words.top < 1:
        raise RunError(f"--top={words.top}: must be 1 or more")
    store.wanted(words.checkpoint, key="checkpoint")
    from pretrain.fill import fill  # torch and megatron-core, several seconds

    fill(words)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom fill", description=__doc__, allow_abbrev=False)
    own.add_argument("checkpoint", type=Path, help="a run's folder, or one checkpoint's")
    own.add_argument(
        "--text", action="append", required=True, help="with [MASK] for each missing token; may be repeated"
    )
    own.add_argument("--top", type=int, default=3, help="guesses to show for each (default: 3)")
    return own
