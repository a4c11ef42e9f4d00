"""`megaloom config RUN.yaml key=value ...`: every value of a run, where it comes from, and DeepSpeed's JSON."""

import argparse
import json
import os
import sys

from rich.console import Console
from rich.table import Table

from pretrain.config_io import Run, load_run
from pretrain.nested import leaves


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="megaloom config", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", help="run file (YAML)")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument(
        "--ranks", type=int, default=int(os.environ.get("WORLD_SIZE", "1")), help="size of the world"
    )
    parser.add_argument("--deepspeed_config", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print the DeepSpeed JSON alone")
    words = parser.parse_intermixed_args(argv)
    run = load_run(words.run, words.words, world_size=words.ranks, deepspeed_config=words.deepspeed_config)
    document = json.dumps(run.deepspeed, indent=2)
    if words.json:
        print(document)
        return
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(value_table(run))
    console.print("\n[bold]DeepSpeed JSON[/bold]")
    console.print(document, markup=False)


def value_table(run: Run) -> Table:
    """One row per value: key, value, origin."""
    table = Table("key", "value", "from", title=f"{run.config.name} on {run.layout.world_size} ranks")
    for key, value in leaves(json.loads(run.config.model_dump_json())):
        table.add_row(key, json.dumps(value), origin(run, key))
    return table


def origin(run: Run, key: str) -> str:
    """Where a value comes from; a section that was given whole names its members' origin."""
    while key:
        if key in run.origins:
            return run.origins[key]
        key = key.rpartition(".")[0]
    return "default"


if __name__ == "__main__":
    main(sys.argv[1:])
