"""What `megaloom slurm` and `megaloom k8s` share: a run that a scheduler starts later, on machines not seen from here.

The run is checked now, as `megaloom run` would check it, but for what only those machines know.  What starts there is
the keeper of each rank, as with the other launchers.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.hostfile import Host
from launch.keeper import PLAIN
from launch.run import checked, not_negative, positive
from launch.words import HARMLESS
from pretrain.checkpoint.store import LATEST, folder_name
from pretrain.config_io import Run
from pretrain.errors import RunError

KEEPER = "launch.keeper"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Scheduled:
    """A checked run, and the size of what it will be started on."""

    run: Run
    path: str  # of the run file
    overrides: tuple[str, ...]  # key=value, and the DeepSpeed JSON if it was named
    num_nodes: int
    ranks_per_node: int
    on_gpus: bool

    @property
    def name(self) -> str:
        return self.run.config.name

    @property
    def program(self) -> str:
        return f"pretrain.{self.run.config.model.family}"

    @property
    def latest(self) -> Path:
        """The file that names the newest checkpoint."""
        return self.run.checkpoints / LATEST

    @property
    def last_checkpoint(self) -> str:
        """Its name when all steps are done."""
        return folder_name(self.run.config.train.steps)

    @property
    def size_shown(self) -> str:
        """How many ranks, and where."""
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        ranks = "1 rank" if self.ranks_per_node == 1 else f"{self.ranks_per_node} ranks"
        return f"{nodes} with {ranks} each"

    def keeper(self, path: str, overrides: Sequence[str]) -> list[str]:
        """The keeper's words after `python -m`, those of the program included."""
        return [KEEPER, PLAIN, self.program, path, *overrides]


def add_common_words(own: argparse.ArgumentParser, *, unit: str) -> None:
    """The run and the size of the job; ``unit`` is what the scheduler calls a machine's share of it."""
    own.add_argument("run", help="run file (YAML)")
    own.add_argument("words", nargs="*", metavar="key=value", help="overrides, such as train.steps=100")
    own.add_argument(
        "--deepspeed_config", metavar="FILE", help="DeepSpeed JSON; overrides the run file's `deepspeed`"
    )
    own.add_argument("--nodes", type=positive, default=1, metavar="N", help=f"{unit} (default: 1)")
    own.add_argument(
        "--ranks-per-node",
        type=positive,
        default=8,
        metavar="M",
        help="ranks on each, and GPUs unless --cpu (default: 8, as the usual machine has)",
    )
    own.add_argument("--cpu", action="store_true", help="ask for no GPUs")
    own.add_argument(
        "--save-before",
        type=not_negative,
        default=300,
        metavar="S",
        help="seconds that a run is given to save itself before it is ended (default: 300)",
    )
    own.add_argument("--out", metavar="FILE", help="write there (default: standard output)")


def scheduled(words: argparse.Namespace) -> Scheduled:
    """The run that the words name, if nothing speaks against it.

    Raises:
        RunError: all that does.
    """
    nodes = [Host(f"node{number}", tuple(range(words.ranks_per_node))) for number in range(words.nodes)]
    run = checked(
        words.run,
        words.words,
        num_ranks=words.nodes * words.ranks_per_node,
        deepspeed_config=words.deepspeed_config,
        hosts=nodes,
    )
    check_lines(words, folder=os.getcwd(), out=run.config.out, python=sys.executable)
    if words.cpu and run.config.kernels == "te":
        raise RunError(
            "kernels=te with --cpu: Transformer Engine needs CUDA; leave --cpu out, or kernels=auto"
        )
    chosen = ["--deepspeed_config", words.deepspeed_config] if words.deepspeed_config else []
    overrides = (*words.words, *chosen)
    return Scheduled(run, words.run, overrides, words.nodes, words.ranks_per_node, not words.cpu)


def check_lines(words: argparse.Namespace, **more: str) -> None:
    """Refuse words and paths that would be more than one line of what is written.

    ``more``: texts that are not on the command line, by the name that a message gives them.
    """
    given = {f"--{key}": value for key, value in vars(words).items()}
    given |= {"run file": given.pop("--run"), "override": given.pop("--words"), **more}
    for name, value in given.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and CONTROL.search(text):
                raise RunError(
                    f"{name}={text!r}: has a line break or another control character, which would be a line of its "
                    "own in the file for the scheduler; take it out"
                )


def shell(words: Sequence[str]) -> str:
    """Words as one line of a shell; those that mean nothing to it stay as they are."""
    return " ".join(word if HARMLESS.fullmatch(word) else shlex.quote(word) for word in words)


def deliver(text: str, out: str | None, how_to_start: str) -> None:
    """To a file, and then a line that says what to do with it; or to standard output, for a pipe."""
    if out is None:
        print(text, end="")
        return
    try:
        Path(out).write_text(text, "utf-8")
    except OSError as fault:
        raise RunError(
            f"--out {out}: cannot be written ({fault.strerror}); name a file in a folder that exists"
        ) from None
    print(f"wrote {out}; start it with: {how_to_start}", file=sys.stderr)
