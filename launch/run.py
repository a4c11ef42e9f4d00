"""`megaloom run RUN.yaml`: check everything, then train through the deepspeed launcher on this machine."""

import argparse
import shlex
import sys

from data_tools.training_data import check_data
from launch.devices import device_type, num_gpus
from launch.local import launcher_command, run_ranks
from pretrain.checkpoint.state import check_before_start
from pretrain.config_io import Run, load_run
from pretrain.config_rules import device_faults
from pretrain.errors import RunError


def main(argv: list[str]) -> None:
    """Exit code 0 when all steps are done or a signal was obeyed."""
    words = parser().parse_intermixed_args(argv)
    num_ranks = words.ranks or max(1, num_gpus())
    run = checked(words.run, words.words, num_ranks=num_ranks, deepspeed_config=words.deepspeed_config)
    check_before_start(run)
    arguments = [words.run, *words.words]
    if words.deepspeed_config:
        arguments += ["--deepspeed_config", words.deepspeed_config]
    program = f"pretrain.{run.config.model.family}"
    if words.dry_run:
        print(shlex.join(launcher_command(program, arguments, num_ranks=num_ranks, port=29500)))
        return
    print(
        f"starting {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}: the libraries take their time",
        flush=True,
    )
    sys.exit(run_ranks(program, arguments, num_ranks=num_ranks))


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom run", description=__doc__, allow_abbrev=False)
    own.add_argument("run", help="run file (YAML), such as pretrain/runs/demo.yaml")
    own.add_argument(
        "words", nargs="*", metavar="key=value", help="overrides, such as train.steps=100 layout.tp=2"
    )
    own.add_argument(
        "--ranks", type=positive, help="processes to start (default: one per GPU, or one on a CPU)"
    )
    own.add_argument(
        "--deepspeed_config", metavar="FILE", help="DeepSpeed JSON; overrides the run file's `deepspeed`"
    )
    own.add_argument(
        "--dry-run", action="store_true", help="check, print the deepspeed command, start nothing"
    )
    return own


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: give 1 or more")
    return number


def checked(path: str, words: list[str], *, num_ranks: int, deepspeed_config: str | None = None) -> Run:
    """The run, if nothing speaks against it; all faults at once otherwise, before any process starts."""
    run = load_run(path, words, world_size=num_ranks, deepspeed_config=deepspeed_config)
    faults = device_faults(run, device_type())
    if device_type() == "cuda" and num_ranks > num_gpus():
        faults.append(
            f"--ranks {num_ranks}: this machine has {num_gpus()} GPUs; start at most one rank on each"
        )
    if run.layout.dispatcher == "hierarchical":
        faults.append(
            "layout.dispatcher=hierarchical: megaloom run starts all ranks on this machine, which has no inside; use "
            "alltoall here, and hierarchical with deepspeed --hostfile"
        )
    if faults:
        raise RunError("\n".join(faults))
    check_data(run.config.data)
    return run
