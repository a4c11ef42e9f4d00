"""`megaloom fill CHECKPOINT --text "a [MASK] story"`: what a BERT or a T5 puts in place of what is masked.

Words are checked here, before torch is imported.
"""

import argparse
from pathlib import Path

from launch.env import for_this_process
from pretrain.checkpoint import store
from pretrain.errors import RunError


def main(argv: list[str]) -> None:
    words = parser().parse_args(argv)
    for name, value in (("--top", words.top), ("--tokens", words.tokens)):
        if value < 1:
            raise RunError(f"{name}={value}: must be 1 or more")
    store.wanted(words.checkpoint, key="checkpoint")
    for_this_process()
    from pretrain.fill import fill  # torch and megatron-core, several seconds

    fill(words)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom fill", description=__doc__, allow_abbrev=False)
    own.add_argument("checkpoint", type=Path, help="a run's folder, or one checkpoint's")
    own.add_argument(
        "--text",
        action="append",
        required=True,
        help="with [MASK] for what is missing; may be repeated",
    )
    own.add_argument("--top", type=int, default=3, help="of a BERT: guesses to show for each (default: 3)")
    own.add_argument(
        "--tokens", type=int, default=32, help="of a T5: tokens to say at most for all (default: 32)"
    )
    return own
