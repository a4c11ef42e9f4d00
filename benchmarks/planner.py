"""Predicted steps against published ones, row by row; how often two configurations are put in the right order; and how
many layouts a search looks at in a second.

    python -m benchmarks.planner                 # errors by source, rankings, search
    python -m benchmarks.planner --rows          # every row, with the parts of the predicted step
    python -m benchmarks.planner --rows Narayanan

The facts and where they are printed are in tests/launch/published.csv.
"""

import argparse
import sys
import time
from itertools import groupby

from rich.console import Console
from rich.table import Table

from launch.hardware import CLUSTERS
from launch.planner import Task, search
from launch.step_time import step_time
from model_providers.presets import get_preset
from pretrain.config import RunConfig
from tests.launch.published import Published, mean_absolute_error, pairs, published

SEARCHES = (
    ("llama3-8b", 64, "h100", 512, 8192),
    ("llama3-70b", 1024, "h100", 2048, 8192),
    ("megatron-530b", 2240, "a100", 2240, 2048),
    ("mixtral-8x7b", 256, "h100", 1024, 4096),
)


def main() -> None:
    own = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    own.add_argument(
        "--rows", nargs="?", const="", metavar="SOURCE", help="every row of the sources with this in it"
    )
    words = own.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    rows = sorted(published(), key=lambda row: row.group)
    if words.rows is not None:
        console.print(row_table([row for row in rows if words.rows in row.group]))
    console.print(source_table(rows))
    console.print(search_table())


def row_table(rows: list[Published]) -> Table:
    table = Table(
        "source", "model", "layout", "published s", "predicted s", "throughput", "parts of the step"
    )
    for row in rows:
        scenario, layout = row.scenario, row.scenario.layout
        step = step_time(scenario, row.cluster, software=row.software)
        parts = {name: value / step.total_s for name, value in step.parts.items()}
        largest = sorted((name for name in parts if parts[name] >= 0.01), key=lambda name: -parts[name])
        table.add_row(
            f"{row.group}: {row.place}",
            row.model,
            f"tp={layout.tp} pp={layout.pp} x{layout.chunks} dp={layout.dp} zero{scenario.zero_stage} "
            f"{scenario.micro_size}x{scenario.num_micro_batches} s={scenario.sequence_length} {scenario.recompute}",
            f"{row.step_s:.4g}",
            f"{row.predicted_s:.4g}",
            f"{row.error:+.1%}",
            ", ".join(f"{name.removesuffix('_s')} {parts[name]:.0%}" for name in largest),
        )
    return table


def source_table(rows: list[Published]) -> Table:
    """Errors are of the throughput; pairs are of one experiment and more than 3% apart."""
    table = Table("source", "rows", "mean abs. error", "mean error", "worst", "pairs in order")
    for name, group in groupby(rows, key=lambda row: row.group):
        members = list(group)
        right = pairs(members)
        table.add_row(
            name,
            str(len(members)),
            f"{mean_absolute_error(members):.1%}",
            f"{sum(row.error for row in members) / len(members):+.1%}",
            f"{max((row.error for row in members), key=abs):+.1%}",
            f"{sum(right)}/{len(right)}" if right else "",
        )
    right = pairs(rows)
    table.add_row(
        "all", str(len(rows)), f"{mean_absolute_error(rows):.1%}", "", "", f"{sum(right)}/{len(right)}"
    )
    return table


def search_table() -> Table:
    table = Table("search", "layouts", "s", "s for 10,000", "the best")
    for model, num_devices, device, global_size, length in SEARCHES:
        config = RunConfig(
            model=get_preset(model),
            data={"train": "data/corpus", "sequence_length": length},  # type: ignore[arg-type]
            train={"steps": 1},  # type: ignore[arg-type]
            precision={"dtype": "bf16"},  # type: ignore[arg-type]
        )
        began_s = time.perf_counter()
        found = search(Task(config, CLUSTERS[device], num_devices, global_size))
        elapsed_s = time.perf_counter() - began_s
        best = found.candidates[0].scenario
        table.add_row(
            f"{model}, {num_devices} x {device}",
            str(found.num_layouts),
            f"{elapsed_s:.1f}",
            f"{elapsed_s / found.num_layouts * 10_000:.1f}",
            f"tp={best.layout.tp} pp={best.layout.pp} {best.schedule} zero{best.zero_stage}",
        )
    return table


if __name__ == "__main__":
    main()
