"""From the command to the first step: seconds of each part, each in a fresh process, medians.

    python -m benchmarks.startup [--repeats 5]

A library's own import is the floor that a run cannot go below; "ours" is what Megaloom adds to it.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from data_tools.prepare import Recipe, prepare

ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
}
LIBRARIES = "import torch, deepspeed; from megatron.core import parallel_state; "
LIBRARIES += "from megatron.core.transformer import transformer_layer"
PARTS = {
    "python alone": "pass",
    "torch": "import torch",
    "torch and DeepSpeed": "import torch, deepspeed",
    "torch, DeepSpeed and megatron-core": LIBRARIES,
    "all that a rank imports (pretrain.run)": "import model_providers.late_compile, pretrain.run",
    "all that a login node imports (megaloom run)": "import launch.run",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder))
        for _ in range(repeats):
            for name, code in PARTS.items():
                times.setdefault(name, []).append(seconds([sys.executable, "-c", code]))
            whole = [sys.executable, "-m", "pretrain.gpt", str(run), "checkpoint.resume=never"]
            name = "a rank to the end of its first step"
            times.setdefault(name, []).append(first_step_s(whole, Path(folder)))
    table = Table("part, in a fresh process", "seconds", title=f"start-up, medians of {repeats}")
    for name, values in times.items():
        table.add_row(name, f"{statistics.median(values):.2f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def write_run(folder: Path) -> Path:
    """A tiny run on a made-up corpus."""
    (folder / "text.txt").write_text("some words that nobody needs to read twice\n" * 500)
    prepare(Recipe((str(folder / "text.txt"),), "bytes"), str(folder / "corpus"), num_workers=1)
    run = {
        "name": "first",
        "out": str(folder),
        "model": {"preset": "tiny", "vocab_size": None},
        "data": {"train": str(folder / "corpus"), "split": "100,0,0", "sequence_length": 32},
        "train": {"steps": 1000000},
        "batch": {"micro_size": 2},
        "monitor": {"tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def seconds(command: list[str]) -> float:
    started_s = time.perf_counter()
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started_s


def first_step_s(command: list[str], folder: Path) -> float:
    """Until the first record of the run is on disk; the run is killed then."""
    metrics = folder / "first" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    environment = {**ENVIRONMENT, "MASTER_PORT": str(free_port())}
    started_s = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.01)
        return time.perf_counter() - started_s
    finally:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
