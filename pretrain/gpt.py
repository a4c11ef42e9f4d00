"""Pretrain a GPT: the program that the `deepspeed` launcher starts on every rank.

deepspeed --module pretrain.gpt RUN.yaml --deepspeed_config ds_configs/zero1.json train.steps=100
"""

import argparse
import os
import sys

from data_tools.errors import DataError
from model_providers.errors import ModelError
from pretrain.config_io import load_run
from pretrain.errors import RunError
from pretrain.run import train


def main(argv: list[str] | None = None) -> int:
    """0 when all steps are done or a signal was obeyed, 2 with one line on a user's mistake."""
    parser = argparse.ArgumentParser(prog="pretrain.gpt", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", help="run file (YAML)")
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides of the run file")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON; overrides the run file's `deepspeed`")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher's; LOCAL_RANK says the same
    words = parser.parse_intermixed_args(argv)
    try:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        train(
            load_run(words.run, words.words, world_size=world_size, deepspeed_config=words.deepspeed_config)
        )
    except (RunError, ModelError, DataError) as mistake:
        if os.environ.get("RANK", "0") == "0":
            print(f"pretrain.gpt: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
