"""`megaloom generate CHECKPOINT --prompt ...`: continue a text with a trained model.

Words are checked here, before torch is imported.
"""

import argparse
from pathlib import Path

from launch.env import for_this_process
from pretrain.checkpoint import store
from pretrain.errors import RunError


def main(argv: list[str]) -> None:
    words = parser().parse_args(argv)
    check_words(words)
    for_this_process()
    from pretrain.generate import speak  # torch and megatron-core, several seconds

    speak(words)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom generate", description=__doc__, allow_abbrev=False)
    own.add_argument("checkpoint", type=Path, help="a run's folder, or one checkpoint's")
    own.add_argument(
        "--prompt", action="append", required=True, help="text to continue; may be given several times"
    )
    own.add_argument("--tokens", type=int, default=64, help="at most this many new tokens (default: 64)")
    own.add_argument("--samples", type=int, default=1, help="continuations of each prompt (default: 1)")
    own.add_argument("--temperature", type=float, default=0.8, help="0 means greedy (default: 0.8)")
    own.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    own.add_argument(
        "--top-k", type=int, default=0, help="draw from the k likeliest tokens (default: 0, all)"
    )
    own.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens whose probabilities reach p (default: 1.0, all)",
    )
    own.add_argument(
        "--seed", type=int, default=0, help="of the first continuation; the next has the next (default: 0)"
    )
    return own


def check_words(words: argparse.Namespace) -> None:
    for name, value, sound, limit in (
        ("--temperature", words.temperature, words.temperature >= 0, "0 (greedy) or more"),
        ("--top-k", words.top_k, words.top_k >= 0, "0 (all tokens) or more"),
        ("--top-p", words.top_p, 0 < words.top_p <= 1, "above 0, at most 1"),
        ("--tokens", words.tokens, words.tokens >= 1, "1 or more"),
        ("--samples", words.samples, words.samples >= 1, "1 or more"),
    ):
        if not sound:
            raise RunError(f"{name}={value}: must be {limit}")
    store.wanted(words.checkpoint, key="checkpoint")
