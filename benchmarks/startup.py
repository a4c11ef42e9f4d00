"""Start-up and exit: seconds of each part, medians over fresh processes, one process tree at a time.

    python -m benchmarks.startup [--repeats 5] [--ranks 2] [--small]

The first table has the imports: a library's own import is the floor that a run cannot go below.  The second table
follows one `megaloom run` of a tiny model: an observer outside reads /proc and waits on pidfds, so it costs the run
next to nothing.  DeepSpeed's launcher would sleep for 1 to 2 s after the last rank ended (deepspeed/launcher/launch.py,
`time.sleep(1)`); on one machine we end it when all ranks have reported success, and its part has a row of its own.
"""

import argparse
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from data_tools.prepare import Recipe, prepare

ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
LIBRARIES = "import torch, deepspeed; from megatron.core import parallel_state; "
LIBRARIES += "from megatron.core.transformer import transformer_layer"
ONE_HOST = (
    "from launch import node; node.stand_in(node._deepspeed_folder()); import deepspeed.launcher.launch"
)
IMPORTS = {
    "python alone": "pass",
    "torch": "import torch",
    "torch and DeepSpeed": "import torch, deepspeed",
    "torch, DeepSpeed and megatron-core": LIBRARIES,
    "all that a rank imports (pretrain.run)": "import model_providers.late_compile, pretrain.run",
    "DeepSpeed's launcher, as DeepSpeed imports it": "import deepspeed.launcher.launch",
    "DeepSpeed's launcher, as a run imports it": ONE_HOST,
    "our launcher (launch.run)": "import launch.run",
}
COMMANDS = {"megaloom --help": ["--help"], "megaloom run --dry-run": ["run", "RUN", "--dry-run"]}
POLL_S = 0.01
LONGEST_S = 600.0


class Timeline(NamedTuple):
    """When each part of one run was over, in seconds after the command."""

    ranks_started_s: float  # all of them
    first_step_s: float
    last_step_s: float
    saved_s: float  # the last checkpoint is complete
    ranks_ended_s: float  # all of them
    deepspeed_ended_s: float
    ended_s: float

    def parts_s(self) -> dict[str, float]:
        return {
            "command -> ranks started": self.ranks_started_s,
            "ranks started -> first step": self.first_step_s - self.ranks_started_s,
            "command -> first step": self.first_step_s,
            "last step -> checkpoint saved": self.saved_s - self.last_step_s,
            "checkpoint saved -> ranks ended": self.ranks_ended_s - self.saved_s,
            "ranks ended -> DeepSpeed's launcher ended": self.deepspeed_ended_s - self.ranks_ended_s,
            "DeepSpeed's launcher ended -> megaloom ended": self.ended_s - self.deepspeed_ended_s,
            "the whole run": self.ended_s,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the run that is followed")
    parser.add_argument("--small", action="store_true", help="once, one rank, and few of the imports")
    words = parser.parse_args()
    repeats, num_ranks = (1, 1) if words.small else (words.repeats, words.ranks)
    imports = dict(list(IMPORTS.items())[-2:] if words.small else IMPORTS.items())
    wall_s: dict[str, list[float]] = {}
    cpu_s: dict[str, list[float]] = {}
    parts_s: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder))
        for _ in range(repeats):
            for name, code in imports.items():
                measure([sys.executable, "-c", code], name, wall_s, cpu_s)
            for name, arguments in COMMANDS.items():
                command = [
                    sys.executable,
                    "-m",
                    "launch",
                    *(f"{run}" if a == "RUN" else a for a in arguments),
                ]
                measure(command, name, wall_s, cpu_s)
            for name, seconds in follow(run, num_ranks).parts_s().items():
                parts_s.setdefault(name, []).append(seconds)
    console = Console(width=None if sys.stdout.isatty() else 100)
    table = Table("imports and commands", "seconds", "of a CPU", title=f"medians of {repeats}")
    for name in wall_s:
        table.add_row(name, f"{statistics.median(wall_s[name]):.2f}", f"{statistics.median(cpu_s[name]):.2f}")
    console.print(table)
    table = Table(f"a run of {num_ranks} rank(s)", "seconds", "least", title=f"medians of {repeats}")
    for name, values in parts_s.items():
        table.add_row(name, f"{statistics.median(values):.2f}", f"{min(values):.2f}")
    console.print(table)


def write_run(folder: Path) -> Path:
    """A tiny run on a made-up corpus."""
    (folder / "text.txt").write_text("some words that nobody needs to read twice\n" * 500)
    prepare(Recipe((str(folder / "text.txt"),), "bytes"), str(folder / "corpus"), num_workers=1)
    run = {
        "name": "first",
        "out": str(folder),
        "model": {"preset": "tiny", "vocab_size": None},
        "data": {"train": str(folder / "corpus"), "split": "100,0,0", "sequence_length": 32},
        "train": {"steps": 5},
        "batch": {"global_size": 4, "micro_size": 2},
        "checkpoint": {"resume": "never"},
        "monitor": {"log_every": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def measure(
    command: list[str], name: str, wall_s: dict[str, list[float]], cpu_s: dict[str, list[float]]
) -> None:
    """One process, to its end: wall-clock seconds, and seconds of a CPU."""
    before, started_s = os.times(), time.perf_counter()
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall_s.setdefault(name, []).append(time.perf_counter() - started_s)
    after = os.times()
    used_s = after.children_user - before.children_user + after.children_system - before.children_system
    cpu_s.setdefault(name, []).append(used_s)


def follow(run: Path, num_ranks: int) -> Timeline:
    """Start ``run``, and note from outside when each part of it is over."""
    folder = run.parent / yaml.safe_load(run.read_text())["name"]
    metrics, latest = folder / "metrics.jsonl", folder / "checkpoints" / "latest"
    num_steps = yaml.safe_load(run.read_text())["train"]["steps"]
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "launch", "run", str(run), "--ranks", str(num_ranks)]
    started_s = time.time()
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        launcher = psutil.Process(process.pid)
        ranks = wait_for(lambda: _running(launcher, "pretrain.gpt", num_ranks), process)
        (node,) = _running(launcher, "launch.node", 1) or _running(launcher, "deepspeed.launcher.launch", 1)
        ranks_started_s = max(_started_s(rank.pid) for rank in ranks)
        pidfds = {os.pidfd_open(each.pid): each.pid for each in (*ranks, node)}
        wait_for(lambda: _steps(metrics), process)
        first_step_s = time.time()
        wait_for(lambda: _steps(metrics) >= num_steps, process)
        last_step_s = time.time()
        ended_s = _ends(pidfds)
        process.wait(LONGEST_S)
        whole_s = time.time()
        assert process.returncode == 0, process.stderr.read().decode()
        marks = (
            *(ranks_started_s, first_step_s, last_step_s, max(last_step_s, latest.stat().st_mtime)),
            *(max(ended_s[rank.pid] for rank in ranks), ended_s[node.pid], whole_s),
        )
        return Timeline(*(mark - started_s for mark in marks))
    finally:
        process.kill()
        process.wait()


def wait_for(ask: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    """Ask until there is an answer that is true."""
    while not (answer := ask()):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(POLL_S)
    return answer


def _running(launcher: psutil.Process, module: str, count: int) -> list[psutil.Process]:
    """The ``count`` processes that run a module; none while there are fewer."""
    found = []
    for child in launcher.children(recursive=True):
        try:
            words = child.cmdline()
            if words[words.index("-m") + 1] == module:
                found.append(child)
        except (psutil.Error, ValueError, IndexError):
            continue
    return found if len(found) == count else []


def _started_s(pid: int) -> float:
    """When a process started; psutil's `create_time` has the boot time in whole seconds."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def _steps(metrics: Path) -> int:
    """How many steps are recorded."""
    try:
        lines = metrics.read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0


def _ends(pidfds: dict[int, int]) -> dict[int, float]:
    """When each process ended, by its number."""
    ended_s: dict[int, float] = {}
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    while len(ended_s) < len(pidfds):
        ready = poll.poll(LONGEST_S * 1000)
        assert ready, "processes of a run are left"
        for pidfd, _ in ready:
            ended_s[pidfds[pidfd]] = time.time()
            poll.unregister(pidfd)
            os.close(pidfd)
    return ended_s


if __name__ == "__main__":
    main()
