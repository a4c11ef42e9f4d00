"""`megaloom export CHECKPOINT --out FOLDER`: weights, configuration and tokenizer as transformers reads them.

Words are checked here, before torch is imported.
"""

import argparse
import re
from pathlib import Path

from launch.env import for_this_process
from pretrain.checkpoint import store
from pretrain.errors import RunError

UNITS = {"MB": 10**6, "GB": 10**9}


def main(argv: list[str]) -> None:
    words = parser().parse_args(argv)
    store.wanted(words.checkpoint, key="checkpoint")
    shard_bytes = size_in_bytes(words.shard_size)
    for_this_process()
    from pretrain.checkpoint.hugging_face import export_checkpoint  # torch, several seconds
    from pretrain.generate import whole_checkpoint

    checkpoint = whole_checkpoint(words.checkpoint)
    for remark in export_checkpoint(checkpoint, words.out, dtype=words.dtype, shard_bytes=shard_bytes):
        print(f"megaloom export: {remark}")
    print(f"{checkpoint} -> {words.out}")


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom export", description=__doc__, allow_abbrev=False)
    own.add_argument("checkpoint", type=Path, help="a run's folder, or one checkpoint's, of any layout")
    own.add_argument("--out", type=Path, required=True, help="the folder to make")
    own.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights (default: the checkpoint's)"
    )
    own.add_argument(
        "--shard-size", default="5GB", help="of a file of weights at most: 5GB, 500MB (default: 5GB)"
    )
    return own


def size_in_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB)", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise RunError(f"--shard-size={text}: must be a number with MB or GB, such as 5GB")
    return int(float(found[1]) * UNITS[found[2].upper()])
