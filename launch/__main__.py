"""The `megaloom` command: a table of commands, each in the room that owns its work.

A command's module is imported only when it is called, so that `megaloom --help` answers at once and works on
a login node without torch.  A user's mistake ends in one line on stderr and exit code 2, never in a traceback.
"""

import difflib
import importlib
import sys
import warnings
from dataclasses import dataclass

from data_tools.errors import DataError
from model_providers.errors import ModelError
from pretrain.disks import no_space
from pretrain.errors import RunError


@dataclass(frozen=True)
class Command:
    """One row: the module whose ``main(argv)`` does the work, and the line that `megaloom --help` shows."""

    module: str
    help: str


COMMANDS = {
    "prepare": Command(
        "data_tools.prepare", "text, JSON lines, parquet or a dataset -> a tokenised corpus (.bin/.idx)"
    ),
    "tokenizer": Command(
        "data_tools.tokenizer_training", "train a byte-level BPE tokenizer on a corpus of text"
    ),
    "data": Command("data_tools.corpus_commands", "inspect, merge or verify tokenised corpora"),
    "run": Command(
        "launch.run", "check a run file, then train it through the deepspeed launcher, here or on many hosts"
    ),
    "estimate": Command(
        "launch.estimate", "what a run takes of memory and time, and which edits would make it fit"
    ),
    "doctor": Command(
        "launch.doctor", "examine this machine, or all hosts of a hostfile: what is broken, and the fix"
    ),
    "tune-nvme": Command(
        "launch.tune_nvme", "the fastest settings of asynchronous I/O on a disk, into a DeepSpeed JSON"
    ),
    "slurm": Command("launch.slurm", "write a batch script that trains a run on a Slurm cluster"),
    "k8s": Command("launch.k8s", "write a manifest that trains a run on a Kubernetes cluster"),
    "parity": Command(
        "launch.parity", "train a run file's model in its layout and in one process, and compare"
    ),
    "generate": Command("launch.generate", "continue a prompt from a checkpoint"),
    "evaluate": Command("launch.evaluate", "perplexity, bits per byte and accuracy on held-out text"),
    "fp8-report": Command(
        "launch.fp8_report", "what FP8 and fewer bits do to a checkpoint's loss, gradients and linears"
    ),
    "fill": Command("launch.fill", "fill in the masked words of a text with a trained encoder"),
    "export": Command("launch.export", "a checkpoint, as a folder that transformers opens"),
    "import": Command("launch.import_weights", "such a folder, as a checkpoint that a run begins from"),
    "config": Command(
        "pretrain.show_config", "print a run's resolved configuration and where each value comes from"
    ),
    "schedule": Command("launch.schedule", "draw a pipeline schedule, its bubble and its memory"),
    "plan": Command(
        "launch.plan", "the fastest legal layout of a model on a cluster, and files to start it with"
    ),
    "plot": Command("pretrain.plot", "draw a run's losses, its experts' loads, or a learning-rate schedule"),
}

USAGE_EXIT_CODE = 2


def main(argv: list[str] | None = None) -> None:
    """Run ``megaloom COMMAND ARGS...``; exits with 2 and one line on a user's mistake."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        sys.exit(_complain("megaloom", f"no command {name!r}; {_nearest(name)}"))
    # What megatron-core says of optional packages, once per import; ours are in `kernels.py`.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    try:
        importlib.import_module(COMMANDS[name].module).main(rest)
    except (DataError, ModelError, RunError) as mistake:
        sys.exit(_complain(f"megaloom {name}", f"{mistake}"))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as fault:
        full = no_space(fault)
        if full is None:
            raise
        sys.exit(_complain(f"megaloom {name}", full))


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = (f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return "\n".join(["usage: megaloom COMMAND ...   (megaloom COMMAND --help tells more)", "", *rows])


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(COMMANDS)}"


def _complain(who: str, what: str) -> int:
    print(f"{who}: {what}", file=sys.stderr)
    return USAGE_EXIT_CODE


if __name__ == "__main__":
    main()
