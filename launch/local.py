"""Start a rank program on this machine through the `deepspeed` launcher, and stay in charge of it.

DeepSpeed's launcher loses its children when it is itself stopped, and gives ranks 30 s to die on any signal.  So it
runs in a session of its own; a first SIGTERM, SIGUSR1 or Ctrl-C goes to the ranks alone, which finish their step,
save and end; a second one ends everything.  Whatever happens, nothing of the session is left behind.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from launch.env import rank_environment

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
RANK_MARK = "--local_rank="  # the launcher puts it on every rank's command line
LAST_WORDS_S = 5.0
WATCH_S = 0.05  # the launcher looks once a second whether a rank has ended, and forgets how
SIGNALLED = {256 - number: number for number in signal.valid_signals()}  # the launcher's exit code for -n
EXIT_STATUS_FIELD = 52  # of /proc/PID/stat, see proc(5)


def run_ranks(module: str, arguments: Sequence[str], *, num_ranks: int) -> int:
    """Run ``python -m module arguments`` on ``num_ranks`` ranks; returns the launcher's exit code."""
    launch = LocalLaunch(launcher_command(module, arguments, num_ranks=num_ranks), num_ranks)
    code = launch.wait()
    if launch.killed is not None or code in SIGNALLED:
        print(launch.killed or f"a rank was {_ended(SIGNALLED[code])}", file=sys.stderr)
    return code


def launcher_command(
    module: str, arguments: Sequence[str], *, num_ranks: int, port: int | None = None
) -> list[str]:
    """The `deepspeed` command line, as a list of words."""
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--log_level", "critical"),
        *("--num_accelerators", str(num_ranks)),
        *("--master_port", str(free_port() if port is None else port)),
        *("--module", module),
        *arguments,
    ]


def free_port() -> int:
    """A TCP port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class LocalLaunch:
    """A launcher process and all that it starts."""

    def __init__(self, command: Sequence[str], num_ranks: int):
        self.killed: str | None = None  # which rank a signal ended, if one did
        self._signals = 0
        self._watched: dict[int, str] = {}  # process number to rank
        self._num_ranks = num_ranks
        environment = rank_environment(num_ranks)
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)

    def wait(self) -> int:
        """Wait for the end, passing signals on."""
        before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self._process.wait(WATCH_S)
                self._watch()
        finally:
            self._end_session()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _watch(self) -> None:
        """Notice the first rank that a signal ends: the others only tell that somebody is gone."""
        if len(self._watched) < self._num_ranks:
            self._watched = {process.pid: rank for process, rank in self._ranks().items()}
        for pid, rank in self._watched.items():
            ended_by = _ending_signal(pid)
            if self.killed is None and self._signals == 0 and ended_by is not None:
                self.killed = f"rank {rank} was {_ended(ended_by)}"

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            self._end_session()
        else:
            name = signal.Signals(number).name
            print(f"{name}: finishing this step, saving, ending (once more: end at once)", file=sys.stderr)
            for process in self._ranks():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)

    def _ranks(self) -> dict[psutil.Process, str]:
        """The rank processes that live, and their numbers."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    for word in child.cmdline():
                        if word.startswith(RANK_MARK):
                            found[child] = word.removeprefix(RANK_MARK)
        return found

    def _end_session(self) -> None:
        for number, patience_s in ((signal.SIGTERM, LAST_WORDS_S), (signal.SIGKILL, LAST_WORDS_S)):
            if not _signal_group(self._process.pid, number):
                return
            deadline_s = time.monotonic() + patience_s
            while _signal_group(self._process.pid, 0) and time.monotonic() < deadline_s:
                self._process.poll()
                time.sleep(0.05)


def _ended(number: int) -> str:
    text = f"killed ({signal.Signals(number).name})"
    if number == signal.SIGKILL:
        text += ", often by the system for want of memory (see dmesg); a checkpoint, if there is one, stands"
    return text


def _ending_signal(pid: int) -> int | None:
    """The signal that ended a process whose parent has not asked yet; None while it lives, or without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    status = int(fields[EXIT_STATUS_FIELD - 3])  # the name and what precedes it are cut off
    return status & 0x7F if fields[0] == "Z" and status & 0x7F else None


def _signal_group(group: int, number: int) -> bool:
    """Whether the process group still has a member to signal."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
