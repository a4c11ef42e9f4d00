"""`megaloom evaluate CHECKPOINT`: loss, perplexity, bits per byte and accuracy on held-out text, in one process.

Of an encoder they are those of the masked tokens, of a T5 those of the decoder's.
"""

import argparse
from pathlib import Path

from launch.env import for_this_process
from pretrain.checkpoint import store
from pretrain.errors import RunError


def main(argv: list[str]) -> None:
    words = parser().parse_args(argv)
    for name, value in (("--samples", words.samples), ("--micro-size", words.micro_size)):
        if value < 1:
            raise RunError(f"{name}={value}: must be 1 or more")
    store.wanted(words.checkpoint, key="checkpoint")
    for_this_process()
    from pretrain.scoring import evaluate  # torch and megatron-core, several seconds

    evaluate(words)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom evaluate", description=__doc__, allow_abbrev=False)
    own.add_argument("checkpoint", type=Path, help="a run's folder, or one checkpoint's")
    own.add_argument("--set", action="append", help="only this held-out set of the run; may be repeated")
    own.add_argument("--data", metavar="PREFIX", help="a whole corpus instead of the run's held-out sets")
    own.add_argument("--samples", type=int, default=1000, help="at most so many of each (default: 1000)")
    own.add_argument("--micro-size", type=int, default=8, help="samples at once (default: 8)")
    own.add_argument("--json", action="store_true", help="one line of JSON")
    return own
