"""Every script in benchmarks/ runs to its table, in a small form."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.moe import traffic_table
from pretrain.engine.preflight import libaio_is_there
from tests.patience import patient_s
from tests.ranks import CPU_ONLY_ENVIRONMENT
from tests.runs import tiny
from tests.thorough import everyday

NO_SCRIPTS = {"alone"}  # a module of the others
ELSEWHERE = {"startup"}  # test_startup.py
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
    "data": ("--text-mb 1 --repeats 1 --documents 10000", "ids"),
    "fp8": ("--small --steps 1 --recipes current", "current, torch"),
    "fp8_loss": ("--run {run_file} --steps 1 --recipes current", "current"),
    "moe": ("--parts steps layer --shapes small --dtypes fp32 --repeats 1", "whole layer"),
    "nvme": ("{disk} --size small", "share of the disk's speed"),
    "planner": ("", "megatron-530b"),
    "throughput": ("--shapes small --dtypes fp32 --repeats 1", "Hugging Face, plain loop"),
}


def run(
    script: str, arguments: str, folder: Path, *, limit_s: float = 150
) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **CPU_ONLY_ENVIRONMENT, "TMPDIR": str(folder)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.{script}", *arguments.split()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=patient_s(limit_s),
        check=False,
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """For temporary files: of a short name, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="b") as folder:
        yield Path(folder)


def test_every_script_has_a_small_form() -> None:
    scripts = {path.stem for path in Path("benchmarks").glob("*.py")} - NO_SCRIPTS
    assert scripts == SMALL.keys() | LONGER.keys() | ELSEWHERE


@pytest.mark.ranks
@everyday(*SMALL)
@pytest.mark.timeout(800)  # the first use of a kernel compiles it
@pytest.mark.parametrize("script", [*SMALL, *LONGER])
def test_a_small_form_prints_its_table(script: str, corpus: str, tmp_path: Path, folder: Path) -> None:
    if script == "nvme" and not libaio_is_there():
        pytest.skip("needs libaio (apt install libaio-dev)")
    arguments, line = (SMALL | LONGER)[script]
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(tiny(corpus, tmp_path / "out")), "utf-8")
    done = run(script, arguments.format(run_file=run_file, disk=folder), folder, limit_s=700)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout, done.stdout
    assert not list(folder.iterdir()), "nothing is left behind"


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
