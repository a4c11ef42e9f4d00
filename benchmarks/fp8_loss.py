"""Does a run in eight bits learn what it learns in bf16?  The demo's model, every recipe, the same samples.

    make demo-corpus
    python -m benchmarks.fp8_loss                # fp32, bf16 and all recipes, 300 steps each: half an hour on two cores
    python -m benchmarks.fp8_loss --recipes current blockwise --steps 100
    python -m benchmarks.fp8_loss --run pretrain/runs/demo-moe.yaml     # routed experts too

One process, one run after the other; weights and samples begin alike.  Losses are those of the held-out samples after
the last step; the last column is the mean of the last tenth of the training losses.  Only the inner blocks run in eight
bits, as always: --all-blocks takes the outer two too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from model_providers.fp8.config import RECIPES

RUN = "pretrain/runs/demo.yaml"
CORPUS = Path("demo/stdlib")


class Ended(NamedTuple):
    """What a run came to."""

    name: str
    held_out: float
    last_tenth: float
    elapsed_s: float


def words_of(name: str, *, all_blocks: bool) -> list[str]:
    """The run file's overrides for a number format or a recipe."""
    if name in ("fp32", "bf16"):
        return [f"precision.dtype={name}"]
    outer = ["fp8.bf16_first=0", "fp8.bf16_last=0"] if all_blocks else []
    return [
        "precision.dtype=bf16",
        f"fp8.recipe={name}",
        f"fp8.experiment={str(name == 'nvfp4').lower()}",
        *outer,
    ]


def train(name: str, folder: Path, words: argparse.Namespace) -> Ended:
    command = [
        sys.executable,
        "-m",
        "launch",
        "run",
        words.run,
        "--ranks",
        "1",
        f"out={folder}",
        f"name={name}",
    ]
    more = [
        "layout.ep=1",
        f"train.steps={words.steps}",
        "train.eval_every=0",
        "train.eval_at_start=false",
        "monitor.tensorboard=false",
        *words_of(name, all_blocks=words.all_blocks),
    ]
    started_s = time.monotonic()
    ended = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{name} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [record["loss"] for record in records]
    held_out = next(value for key, value in records[-1].items() if key.startswith("eval/"))
    tenth = losses[-max(1, len(losses) // 10) :]
    return Ended(name, held_out, statistics.mean(tenth), time.monotonic() - started_s)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", default=RUN, metavar="FILE", help=f"another run file with held-out samples than {RUN}"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument(
        "--all-blocks", action="store_true", help="the first and the last block in eight bits too"
    )
    words = parser.parse_args()
    if str(CORPUS) in Path(words.run).read_text("utf-8") and not CORPUS.with_suffix(".bin").is_file():
        sys.exit(f"{CORPUS}.bin is not there: make demo-corpus")
    with tempfile.TemporaryDirectory(prefix="megaloom-fp8-") as folder:
        runs = []
        for name in ("fp32", "bf16", *words.recipes):
            runs.append(train(name, Path(folder), words))
            print(f"{name}: {runs[-1].held_out:.4f} after {runs[-1].elapsed_s:.0f} s", flush=True)
    show(runs, words)


def show(runs: list[Ended], words: argparse.Namespace) -> None:
    bf16 = next(run for run in runs if run.name == "bf16")
    table = Table(title=f"{words.run}, one process, {words.steps} steps")
    for column in ("run", "held-out loss", "against bf16", "last tenth of training", "s"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in runs:
        gap = 100 * (run.held_out / bf16.held_out - 1)
        table.add_row(
            run.name, f"{run.held_out:.4f}", f"{gap:+.2f}%", f"{run.last_tenth:.4f}", f"{run.elapsed_s:.0f}"
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
