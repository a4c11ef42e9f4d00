"""Pretrain a GPT: the program that the `deepspeed` launcher starts on every rank.

deepspeed --module pretrain.gpt RUN.yaml --deepspeed_config ds_configs/zero1.json train.steps=100
"""

import sys

from pretrain.program import add_run_words, exit_code, load_on_rank, rank_parser
from pretrain.run import train


def main(argv: list[str] | None = None) -> int:
    """0 when all steps are done or a signal was obeyed, 2 with one line on a user's mistake."""
    parser = rank_parser("pretrain.gpt", __doc__)
    add_run_words(parser)
    words = parser.parse_intermixed_args(argv)
    return exit_code(parser.prog, lambda: train(load_on_rank(words)))


if __name__ == "__main__":
    sys.exit(main())
