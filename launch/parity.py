"""`megaloom parity RUN.yaml --ranks N`: train in the run's layout and in one process, and compare.

The same samples, seeds and global batch; the reference is one process without ZeRO or offload.  Use it on a
shrunken model (model.num_layers=2 model.hidden_size=...) to check a layout before it costs GPU hours.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.devices import num_gpus
from launch.env import rank_environment
from launch.leftovers import scratch_folder
from launch.report import Started, alone
from launch.run import checked, positive
from launch.supervise import Options, Supervisor
from pretrain.config import LayoutConfig
from pretrain.config_io import Run
from pretrain.nested import leaves


def main(argv: list[str]) -> None:
    """Exit code 0 when losses and norms agree, 1 when they differ."""
    words = parser().parse_intermixed_args(argv)
    num_ranks = words.ranks or max(1, num_gpus())
    run = checked(
        words.run, words.words, num_ranks=num_ranks, deepspeed_config=words.deepspeed_config, goes_on=False
    )
    reference = [*words.words, *one_process(run)]
    reference_json = "zero0.json" if run.config.precision.dtype == "fp32" else "zero1.json"
    checked(words.run, reference, num_ranks=1, deepspeed_config=reference_json, goes_on=False)
    with scratch_folder("parity") as folder:
        one, many = folder / "one.safetensors", folder / "many.safetensors"
        own_json = ["--deepspeed_config", words.deepspeed_config] if words.deepspeed_config else []
        print(f"{words.steps} steps in one process", flush=True)
        _record(words, one, [*reference, "--deepspeed_config", reference_json], num_ranks=1)
        print(f"{words.steps} steps on {num_ranks} ranks", flush=True)
        _record(words, many, [*words.words, *own_json], num_ranks=num_ranks)
        sys.exit(_compare(many, one, words.tolerance))


def one_process(run: Run) -> list[str]:
    """The layout's defaults, and the same micro-batches in a row: experts are balanced within each."""
    batch = {"global_size": run.global_size, "micro_size": run.micro_size, "accumulation_steps": None}
    facts = {"layout": LayoutConfig().model_dump(), "batch": batch}
    return [f"{key}={json.dumps(value)}" for key, value in leaves(facts)]


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom parity", description=__doc__, allow_abbrev=False)
    own.add_argument("run", help="run file (YAML)")
    own.add_argument("words", nargs="*", metavar="key=value", help="overrides for both sides")
    own.add_argument("--ranks", type=positive, help="processes of the run's layout (default: one per GPU)")
    own.add_argument("--steps", type=positive, default=20)
    own.add_argument(
        "--tolerance", type=float, default=1e-5, help="relative, on losses and gradient norms (fp32: 1e-5)"
    )
    own.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON of the run's layout")
    return own


def _record(words: argparse.Namespace, out: Path, arguments: list[str], *, num_ranks: int) -> None:
    recorder = ["record", str(out), words.run, *arguments, "--steps", str(words.steps)]
    supervisor = Supervisor("pretrain.parity", recorder, Options(num_ranks=num_ranks, stall_factor=0.0))
    code = supervisor.run(_tell)
    if code != 0:
        sys.exit(code)


def _tell(history: Sequence[Started]) -> None:
    failure = history[-1].outcome.failure
    assert failure is not None
    print(alone(failure), file=sys.stderr)


def _compare(trace: Path, reference: Path, tolerance: float) -> int:
    command = [
        sys.executable,
        "-m",
        "pretrain.parity",
        "compare",
        str(trace),
        str(reference),
        "--tolerance",
        str(tolerance),
    ]
    return subprocess.run(command, env=rank_environment(1), check=False).returncode
