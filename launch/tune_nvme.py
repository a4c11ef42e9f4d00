"""`megaloom tune-nvme FOLDER`: what a disk reads and writes under DeepSpeed's asynchronous I/O, by its settings.

DeepSpeed's own tuner measures (`ds_nvme_tune`, deepspeed/nvme/perf_run_sweep.py), in a process of its own; here its
folder is made and removed, its logs are read, and the best setting is written as the JSON's ``aio`` section.  The
tuner itself calls the number of threads ``num_threads``, which DeepSpeed's JSON does not know: there it is
``intra_op_parallelism``.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.env import rank_environment
from launch.nvme_logs import Setting, Speed, best, read_logs
from pretrain.checkpoint.store import write_whole
from pretrain.ds_config import read_json
from pretrain.errors import RunError

TUNER = "pretrain.engine.nvme_tuner"
STARTS = "DeepSpeed's tuner starts (its kernel is compiled at first use: minutes)"
MIB = 1 << 20
SPARE = 3  # files of the size that is read and written, at most at once
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
Space = dict[str, list[Any]]
QUICK: Space = {"block_size": ["1M", "8M"], "queue_depth": [8, 32], "io_parallel": [1, 2, 4]}
THOROUGH: Space = {
    "block_size": ["1M", "4M", "8M"],
    "queue_depth": [4, 8, 32, 128],
    "io_parallel": [1, 2, 4, 8],
}
WAYS: Space = {"sequential_requests": [False], "single_submit": [False]}
ALL_WAYS: Space = {"sequential_requests": [True, False], "single_submit": [False, True]}


def main(argv: list[str]) -> None:
    words = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _end)  # else the files would stay
    if words.out is not None and words.json is None:
        raise RunError("--out: give the DeepSpeed JSON that it is to be a copy of: --json FILE")
    document = read_json(words.json) if words.json is not None else {}
    check_folder(words.folder, words.megabytes * MIB)
    space = {**THOROUGH, **ALL_WAYS} if words.thorough else {**QUICK, **WAYS}
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False, markup=False)
    speeds = sweep(words.folder, space, megabytes=words.megabytes, console=console)
    chosen = best(speeds)
    console.print(as_table(speeds, chosen))
    section = aio_section(chosen)
    console.print("aio = " + json.dumps(section), soft_wrap=True)
    if words.json is not None:
        target = words.out or words.json
        write_json(target, {**document, "aio": {**(document.get("aio") or {}), **section}})
        console.print(f"written into {target}", soft_wrap=True)


def _end(*_: Any) -> None:
    sys.exit(128 + signal.SIGTERM)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megaloom tune-nvme", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="on the disk that offload to NVMe will use (nvme_path)")
    parser.add_argument("--json", type=Path, help="a DeepSpeed JSON whose aio section is set, in place")
    parser.add_argument("--out", type=Path, help="write a copy of --json there instead")
    parser.add_argument("--megabytes", type=_megabytes, default=256, help="read and written at a time (256)")
    parser.add_argument("--thorough", action="store_true", help="192 settings instead of 12: an hour or so")
    return parser


def _megabytes(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r}: give a whole number of MiB, 1 or more")
    return int(word)


def check_folder(folder: Path, num_bytes: int) -> None:
    """Nothing but a folder on a disk with room for the test will do."""
    if not folder.is_dir():
        raise RunError(
            f"{folder}: no such folder; make it on the disk that is to be tuned for (mkdir -p {folder})"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"{folder}: may not be written to; choose a folder of your own on that disk")
    kind = file_system(folder, Path("/proc/self/mounts").read_text("utf-8"))
    if kind in MEMORY_FILE_SYSTEMS:
        raise RunError(
            f"{folder}: lies on {kind}, which is memory and no disk; choose a folder on a local disk"
        )
    free = shutil.disk_usage(folder).free
    if free < SPARE * num_bytes:
        raise RunError(
            f"{folder}: {free / MIB:,.0f} MiB free, {SPARE * num_bytes / MIB:,.0f} needed; make room, or a smaller "
            f"--megabytes={max(1, free // SPARE // MIB)}"
        )


def file_system(folder: Path, mounts: str) -> str:
    """The kind of file system a folder lies on, from the text of /proc/self/mounts."""
    whole, found, depth = folder.resolve(), "unknown", -1
    for line in mounts.splitlines():
        _, place, kind, *_ = line.split(" ")
        point = Path(place.replace("\\040", " "))
        if whole.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = kind, len(point.parts)
    return found


def sweep(folder: Path, space: Space, *, megabytes: int, console: Console) -> dict[Setting, Speed]:
    """Every setting of ``space`` tried by DeepSpeed's tuner; nothing stays in the folder."""
    with _workplace(folder) as (work, logs):
        config = logs / "space.json"
        config.write_text(json.dumps(space), "utf-8")
        command = [sys.executable, "-m", TUNER, str(logs), "--nvme_dir", str(work)]
        command += ["--sweep_config", str(config), "--io_size", f"{megabytes}M", "--log_dir", str(logs)]
        number = 2 * len(list(itertools.product(*space.values())))
        _watch(command, logs, number, console)
        return read_logs(logs)


@contextmanager
def _workplace(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A folder of our own on the disk, and one for logs elsewhere; both are gone afterwards."""
    both = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, both)  # a folder made and not yet known would stay
    try:
        made = tempfile.TemporaryDirectory(prefix=".megaloom-tune-", dir=folder)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
    with made as work, tempfile.TemporaryDirectory() as logs:
        yield Path(work), Path(logs)


def _watch(command: Sequence[str], logs: Path, number: int, console: Console) -> None:
    """Run the tuner and tell how far it is, by the logs that it writes; its last words if it fails."""
    words = logs / "tuner.txt"
    with (
        words.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=rank_environment(1)) as tuner,
        console.status(STARTS) as status,
    ):
        told = 0
        if not console.is_terminal:  # where a status is not seen
            console.print(STARTS)
        try:
            while tuner.poll() is None:
                done = len(list(logs.glob("*_logs/*.txt")))
                if done != told:
                    told, line = done, f"measurement {done} of {number}"
                    status.update(line)
                    if not console.is_terminal:
                        console.print(line)
                time.sleep(0.2)
        finally:
            tuner.terminate()
    if tuner.returncode != 0:
        raise RunError(f"DeepSpeed's tuner: {_last_line([*sorted(logs.glob('*_logs/*.txt')), words])}")


def _last_line(files: Sequence[Path]) -> str:
    """Of the newest file that has one: what failed says why there."""
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        lines = [line for line in file.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if "Error" in line or "error" in line]
        if told:
            return told[-1].strip().removeprefix("error: ")
    return "it said nothing"


def as_table(speeds: dict[Setting, Speed], chosen: Setting) -> Table:
    """Fastest first; all of a quick tuning, the first twenty of a thorough one."""
    columns = ("block", "queue depth", "threads", "submit", "events", "read GB/s", "write GB/s", "")
    table = Table(*columns)
    ranking = sorted(speeds, key=lambda setting: -speeds[setting].together)
    for setting in ranking[:20]:
        speed = speeds[setting]
        table.add_row(
            f"{setting.block_size / MIB:g} MiB",
            str(setting.queue_depth),
            str(setting.threads),
            "single" if setting.single_submit else "many",
            "overlap" if setting.overlap_events else "in turn",
            f"{speed.read_bytes_per_s / 1e9:.2f}",
            f"{speed.write_bytes_per_s / 1e9:.2f}",
            "best" if setting == chosen else "",
        )
    return table


def aio_section(setting: Setting) -> dict[str, Any]:
    """In the JSON's words."""
    return {
        "block_size": setting.block_size,
        "queue_depth": setting.queue_depth,
        "intra_op_parallelism": setting.threads,
        "single_submit": setting.single_submit,
        "overlap_events": setting.overlap_events,
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    try:
        write_whole(path, json.dumps(document, indent=2) + "\n")
    except OSError as fault:
        raise RunError(f"{path}: cannot be written: {fault.strerror}") from None
