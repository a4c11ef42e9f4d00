"""A model whose states are several times larger than the memory it may use: ZeRO-Infinity on one machine.

`megaloom run` trains it with weights and optimizer on a disk, watched from outside: the most resident memory of the
rank, bytes that it read and wrote (/proc/PID/io), seconds of a step.  The same disk is measured by DeepSpeed's own tool
with the JSON's settings in the same minutes, so that the share of its speed means something.

    python -m benchmarks.nvme FOLDER                    # 100M parameters: 1.6 GB of states under 1.2 GB, minutes
    python -m benchmarks.nvme FOLDER --size 1b          # 1B parameters: 16 GB of states under 5 GB
    python -m benchmarks.nvme FOLDER --overlap          # also without reading ahead and writing behind

Fails where the rank took more than the limit.  With a writable memory cgroup the kernel enforces it; else what was
seen is compared.  The page cache counts for neither: swap files are read and written past it (O_DIRECT).
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from data_tools.prepare import Recipe, prepare
from launch.memory import memory
from launch.nvme_logs import Setting
from launch.scenario import scenario_of
from launch.tune_nvme import sweep
from pretrain.config_io import load_run

JSON = Path("ds_configs/zero3_nvme_offload.json")
CGROUP = Path("/sys/fs/cgroup/memory")  # version 1; version 2 has no such folder
POLL_S = 0.05
NAME = "larger-than-memory"


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    ffn: int
    limit_bytes: int
    steps: int
    sequence: int


SIZES = {
    "small": Size(layers=2, width=512, ffn=1024, limit_bytes=1_200_000_000, steps=2, sequence=64),
    "100m": Size(layers=8, width=1024, ffn=2816, limit_bytes=1_200_000_000, steps=4, sequence=64),
    "1b": Size(layers=20, width=2048, ffn=5632, limit_bytes=5_000_000_000, steps=2, sequence=64),
}


@dataclass
class Seen:
    """Of the rank's process, from outside."""

    peak_resident_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    by_step: list[tuple[int, int]] = field(default_factory=list)  # read and written when a step's record came


def main() -> None:
    words = parser().parse_args()
    if not words.folder.is_dir():
        sys.exit(f"folder={words.folder}: is not there; name a folder on the disk to measure")
    size = SIZES[words.size]
    limit = int(words.limit_gb * 1e9) if words.limit_gb else size.limit_bytes
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    failures = []
    for overlaps in (True, False) if words.overlap else (True,):
        with tempfile.TemporaryDirectory(prefix=".megaloom-bench-", dir=words.folder) as place:
            table, peak = one(Path(place), size, limit, overlaps=overlaps, saves=words.save, console=console)
        console.print(table)
        if peak > limit:
            failures.append(f"{peak / 1e9:.2f} GB were resident, and {limit / 1e9:.2f} GB allowed")
    if failures:
        sys.exit("; ".join(failures))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="on the disk; what is written there is removed at the end")
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument(
        "--limit-gb", type=float, help="resident memory that is allowed; by size if not given"
    )
    parser.add_argument(
        "--overlap", action="store_true", help="with and without reading ahead and writing behind"
    )
    parser.add_argument("--save", action="store_true", help="also write a checkpoint at the end")
    return parser


def one(
    place: Path, size: Size, limit: int, *, overlaps: bool, saves: bool, console: Console
) -> tuple[Table, int]:
    """Train once, measure the disk, and compare; the table and the peak of resident memory."""
    document = write_json(place, overlaps=overlaps)
    path = write_run(place, size)
    run = load_run(path, world_size=1)
    aio = document["aio"]
    before = disk_speed(place, aio, console)
    seen = watched(path, place, limit, saves=saves, num_steps=size.steps)
    after = disk_speed(place, aio, console)
    disk = tuple(max(pair) for pair in zip(before, after, strict=True))
    records = [json.loads(line) for line in (place / NAME / "metrics.jsonl").read_text().splitlines()]
    return report(run, seen, records, disk, limit, overlaps=overlaps), seen.peak_resident_bytes


def write_json(place: Path, *, overlaps: bool) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(JSON.read_text("utf-8"))
    optimizer = document["zero_optimization"]["offload_optimizer"]
    optimizer["pipeline_read"] = optimizer["pipeline_write"] = overlaps
    (place / "deepspeed.json").write_text(json.dumps(document))
    return document


def write_run(place: Path, size: Size) -> Path:
    """bf16 weights, fp32 masters and moments; one micro-batch, whose bf16 gradients need no wider sum."""
    (place / "text.txt").write_text("some words that nobody needs to read twice\n" * 2000)
    prepare(Recipe((str(place / "text.txt"),), "bytes"), str(place / "corpus"), num_workers=1)
    (place / "nvme").mkdir()
    run = {
        "name": NAME,
        "out": str(place),
        "model": {
            "preset": "tiny",
            "num_layers": size.layers,
            "hidden_size": size.width,
            "num_attention_heads": size.width // 128,
            "num_kv_heads": size.width // 128,
            "ffn_hidden_size": size.ffn,
            "vocab_size": None,
        },
        "data": {"train": str(place / "corpus"), "split": "100,0,0", "sequence_length": size.sequence},
        "train": {"steps": size.steps},
        "batch": {"micro_size": 1},
        "precision": {"dtype": "bf16", "accumulate": "bf16"},
        "nvme_path": str(place / "nvme"),
        "deepspeed": str(place / "deepspeed.json"),
        "monitor": {"tensorboard": False},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(run))
    return place / "run.yaml"


def disk_speed(place: Path, aio: dict[str, Any], console: Console) -> tuple[float, float]:
    """Bytes a second that the disk reads and writes with these settings, by DeepSpeed's tool."""
    setting = Setting(
        aio["block_size"],
        aio["queue_depth"],
        aio["intra_op_parallelism"],
        aio["single_submit"],
        aio["overlap_events"],
    )
    space = {
        "block_size": [str(setting.block_size)],
        "queue_depth": [setting.queue_depth],
        "io_parallel": [setting.threads],
        "single_submit": [setting.single_submit],
        "sequential_requests": [not setting.overlap_events],
    }
    speed = sweep(place, space, megabytes=256, console=console)[setting]
    return speed.read_bytes_per_s, speed.write_bytes_per_s


def watched(path: Path, place: Path, limit: int, *, saves: bool, num_steps: int) -> Seen:
    """Start `megaloom run` and look at its rank until it has done its steps, or has saved them too."""
    command = [sys.executable, "-m", "launch", "run", str(path), "--ranks", "1"]
    metrics, seen = place / NAME / "metrics.jsonl", Seen()
    with memory_group(limit) as enter, (place / "said.txt").open("w") as said:
        # The run is killed after its last step, and what it leaves behind is removed with ``place``.
        environment = {**os.environ, "TMPDIR": str(place)}
        process = subprocess.Popen(
            command, env=environment, stdout=said, stderr=subprocess.STDOUT, preexec_fn=enter
        )
        try:
            while process.poll() is None:
                look(process.pid, seen)
                done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
                while len(seen.by_step) < done:
                    seen.by_step.append((seen.read_bytes, seen.written_bytes))
                if done >= num_steps and not saves:
                    break
                time.sleep(POLL_S)
        finally:
            end(process)
    if process.returncode not in (0, None) and len(seen.by_step) < num_steps:
        sys.exit((place / "said.txt").read_text()[-3000:])
    return seen


def look(launcher: int, seen: Seen) -> None:
    """The rank is the process that runs `pretrain.gpt`, somewhere below the launcher."""
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            if "pretrain.gpt" not in " ".join(process.cmdline()):
                continue
            status = Path(f"/proc/{process.pid}/status").read_text()
            io = Path(f"/proc/{process.pid}/io").read_text()
        except (psutil.Error, OSError):
            continue
        seen.peak_resident_bytes = max(seen.peak_resident_bytes, 1024 * number("VmHWM", status))
        seen.read_bytes = max(seen.read_bytes, number("read_bytes", io))
        seen.written_bytes = max(seen.written_bytes, number("write_bytes", io))


def number(key: str, text: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


@contextmanager
def memory_group(limit: int) -> Iterator[Any]:
    """A cgroup of version 1 with this limit, to be entered before the run starts; elsewhere nothing enforces it."""
    group = CGROUP / f"megaloom-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        # The launcher's processes have half a gigabyte of their own, and the group counts them too.
        (group / "memory.limit_in_bytes").write_text(str(limit + 500_000_000))
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def end(process: "subprocess.Popen[bytes]") -> None:
    """The launcher and all below it."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in family:
            each.kill()
        psutil.wait_procs(family, timeout=10)
    process.wait()


def report(
    run: Any,
    seen: Seen,
    records: list[dict[str, Any]],
    disk: tuple[float, ...],
    limit: int,
    *,
    overlaps: bool,
) -> Table:
    """What was seen beside what follows from the model's size."""
    (rank,) = memory(scenario_of(run)).ranks
    parameters = run.parameters
    states = rank.nvme.total + rank.cpu.gradients
    (read_0, written_0), (read_1, written_1) = seen.by_step[0], seen.by_step[-1]
    number_of = max(1, len(seen.by_step) - 1)
    read, written = (read_1 - read_0) / number_of, (written_1 - written_0) / number_of
    later = records[1:]  # the first step makes the moments
    step_s, optimizer_s = (
        statistics.median(each[key] for each in later) for key in ("step_s", "time/step_s")
    )
    ideal_s = read / disk[0] + written / disk[1]
    # The optimizer's step reads masters, moments and gradients, and writes all but those, and weights.
    ideal_optimizer_s = 16 * parameters / disk[0] + 14 * parameters / disk[1]
    # Read: weights twice, masters, moments, gradients. Written: gradients, masters, moments, weights.
    theory = (2 * 2 + 4 + 8 + 4) * parameters, (4 + 4 + 8 + 2) * parameters
    table = Table(
        "", "", title=f"{parameters / 1e6:,.0f}M parameters, reading ahead and writing behind: {overlaps}"
    )
    rows = {
        "states (2 + 4 + 8 bytes a parameter on the disk, gradients 4 there and 2 in memory)": gb(states),
        "resident at most (allowed)": f"{gb(seen.peak_resident_bytes)} ({gb(limit)})",
        "states over resident memory": f"{states / seen.peak_resident_bytes:.1f}x",
        "estimated: tensors in memory": gb(rank.cpu.total + rank.device.total),
        "read in a step (2 x weights, masters, moments, gradients)": f"{gb(read)} ({gb(theory[0])})",
        "written in a step (gradients, masters, moments, weights)": f"{gb(written)} ({gb(theory[1])})",
        "step, of which the optimizer's": f"{step_s:.1f} s, {optimizer_s:.1f} s",
        "bytes a second over the whole step": f"{gb((read + written) / step_s)}/s",
        "the disk alone, read and written": f"{gb(disk[0])}/s, {gb(disk[1])}/s",
        "share of the disk's speed, in the optimizer's step and in the whole one": (
            f"{ideal_optimizer_s / optimizer_s:.0%}, {ideal_s / step_s:.0%}"
        ),
    }
    for title, value in rows.items():
        table.add_row(title, value)
    return table


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
