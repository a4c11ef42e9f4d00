"""`megaloom config RUN.yaml key=value ...`: every value of a run, where it comes from, and DeepSpeed's JSON.

Secrets are shown as ***.
"""

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table

from pretrain.config_io import Run, find_deepspeed_json, load_run
from pretrain.ds_config import PAIRS, read_json
from pretrain.ds_offload import AUTO
from pretrain.nested import get, leaves
from pretrain.redaction import redacted

ALSO_NAMED = {
    "bf16.enabled": "precision.dtype",
    "fp16.enabled": "precision.dtype",
    "communication_data_type": "precision.accumulate",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="megaloom config", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", help="run file (YAML)")
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides of the run file")
    parser.add_argument("--ranks", type=int, default=1, help="size of the world (default: 1)")
    parser.add_argument(
        "--deepspeed_config", metavar="FILE", help="DeepSpeed JSON; overrides the run file's `deepspeed`"
    )
    parser.add_argument("--json", action="store_true", help="print the DeepSpeed JSON alone")
    words = parser.parse_intermixed_args(argv)
    run = load_run(words.run, words.words, world_size=words.ranks, deepspeed_config=words.deepspeed_config)
    if words.json:
        print(json.dumps(redacted(run.deepspeed), indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(value_table(run))
    console.print(json_table(run))


def value_table(run: Run) -> Table:
    """One row per value: key, value, origin."""
    table = Table("key", "value", "from", title=f"{run.config.name}, world size {run.layout.world_size}")
    for key, value in leaves(redacted(json.loads(run.config.model_dump_json()))):
        table.add_row(key, json.dumps(value), origin(run, key))
    return table


def json_table(run: Run) -> Table:
    """The same for what DeepSpeed is given."""
    path = find_deepspeed_json(run.config.deepspeed)
    stated = read_json(path)
    named_in_run = {pair.json_key: pair.run_key for pair in PAIRS} | ALSO_NAMED
    table = Table("key", "value", "from", title=f"DeepSpeed JSON, as it is after {path.name} is filled")
    for key, value in leaves(redacted(run.deepspeed)):
        if get(stated, key) not in (None, AUTO):
            source = path.name
        elif key in named_in_run:
            source = f"{named_in_run[key]} ({origin(run, named_in_run[key])})"
        else:
            source = "Megaloom"
        table.add_row(key, json.dumps(value), source)
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
