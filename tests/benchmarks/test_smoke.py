"""Every script in benchmarks/ runs to its table, in a small form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.moe import traffic_table
from tests.patience import patient_s
from tests.ranks import CPU_ONLY_ENVIRONMENT

LIMIT_S = 150
NO_SCRIPTS = {"alone"}  # a module of the others
ELSEWHERE = {"startup": "test_startup.py", "nvme": "test_that_a_disk_is_missing_is_one_line"}
# Arguments of a small form, and a line of the table that it prints.
SMALL: dict[str, tuple[str, str]] = {
    "loss": ("--words 512 --tokens 64 --width 32", "chunks of 64"),
    "mfu": ("--small --steps 1", "tokens/s"),
    "pipeline": (
        "--pp 2 --layers 4 --micro-batches 2 --layer-ms 1 --steps 1 --only 1f1b",  # of all three engines
        "DeepSpeed 1f1b",
    ),
    "vocabulary": ("--layers 4 --micro-batches 4 --vocabularies 256 512", "512"),
}
LONGER: dict[str, tuple[str, str]] = {
    "data": ("--text-mb 1 --repeats 1", "one rank"),
    "fp8": ("--small --steps 1 --recipes current", "current, torch"),
    "fp8_loss": ("--steps 1 --recipes current", "current"),
    "moe": ("--parts steps layer --shapes small --dtypes fp32 --repeats 1", "whole layer"),
    "planner": ("", "megatron-530b"),
    "throughput": ("--shapes small --dtypes fp32 --repeats 1", "Hugging Face, plain loop"),
}


def run(script: str, arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **CPU_ONLY_ENVIRONMENT, "TMPDIR": str(folder)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.{script}", *arguments.split()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=patient_s(LIMIT_S),
        check=False,
    )


def test_every_script_has_a_small_form() -> None:
    scripts = {path.stem for path in Path("benchmarks").glob("*.py")} - NO_SCRIPTS
    assert scripts == SMALL.keys() | LONGER.keys() | ELSEWHERE.keys()


@pytest.mark.ranks
@pytest.mark.parametrize(
    "script", [*SMALL, *(pytest.param(script, marks=pytest.mark.thorough) for script in LONGER)]
)
def test_a_small_form_prints_its_table(script: str, tmp_path: Path) -> None:
    arguments, line = (SMALL | LONGER)[script]
    done = run(script, arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout, done.stdout
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.ranks
@pytest.mark.parametrize("script", LONGER)
def test_a_longer_benchmark_begins(script: str, tmp_path: Path) -> None:
    """All of its imports are there, and its arguments are understood; its small form is for `make test-all`."""
    done = run(script, "--help", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.ranks
def test_dispatchers_are_compared_on_ranks() -> None:
    table = traffic_table(1, nodes=2, ranks_per_node=2)
    assert list(table.columns[0].cells) == ["allgather", "alltoall", "hierarchical"]


def test_that_a_disk_is_missing_is_one_line(tmp_path: Path) -> None:
    done = run("nvme", str(tmp_path / "none"), tmp_path)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(f"folder={tmp_path}")
    assert "Traceback" not in done.stderr
