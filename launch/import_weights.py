"""`megaloom import FOLDER --out RUN`: a model that transformers saved becomes a checkpoint of weights.

A run begins from it with checkpoint.weights_from=RUN, in any layout; `megaloom generate RUN` speaks with it.
"""

import argparse
from pathlib import Path

from launch.env import for_this_process
from pretrain.errors import RunError


def main(argv: list[str]) -> None:
    words = parser().parse_args(argv)
    if words.sequence_length is not None and words.sequence_length < 1:
        raise RunError(f"--sequence-length={words.sequence_length}: must be 1 or more")
    for_this_process()
    from pretrain.checkpoint.hugging_face import import_checkpoint  # torch, several seconds

    for remark in import_checkpoint(words.source, words.out, sequence_length=words.sequence_length):
        print(f"megaloom import: {remark}")
    print(f"{words.source} -> {words.out}")
    print(
        f"begin a run from it with checkpoint.weights_from={words.out}, and the model section of "
        f"{words.out}/checkpoints/step-0000000/run.yaml"
    )


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom import", description=__doc__, allow_abbrev=False)
    own.add_argument("source", type=Path, help="folder with config.json, *.safetensors and tokenizer files")
    own.add_argument("--out", type=Path, required=True, help="the run's folder to make")
    own.add_argument("--sequence-length", type=int, help="for generate (default: the model's largest)")
    return own
