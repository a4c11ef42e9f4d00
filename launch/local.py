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
from types import FrameType

import psutil

from launch.env import rank_environment

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
RANK_MARK = "--local_rank="  # the launcher puts it on every rank's command line
LAST_WORDS_S = 5.0


def run_ranks(module: str, arguments: Sequence[str], *, num_ranks: int) -> int:
    """Run ``python -m module arguments`` on ``num_ranks`` ranks; returns the launcher's exit code."""
    return LocalLaunch(launcher_command(module, arguments, num_ranks=num_ranks), num_ranks).wait()


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
        self._signals = 0
        environment = rank_environment(num_ranks)
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)

    def wait(self) -> int:
        """Wait for the end, passing signals on."""
        before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            return self._process.wait()
        finally:
            self._end_session()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            self._end_session()
        else:
            name = signal.Signals(number).name
            print(f"{name}: finishing this step, saving, ending (once more: end at once)", file=sys.stderr)
            for rank in self._ranks():
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(signal.SIGTERM)

    def _ranks(self) -> list[psutil.Process]:
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if any(word.startswith(RANK_MARK) for word in child.cmdline()):
                        found.append(child)
        return found

    def _end_session(self) -> None:
        for number, patience_s in ((signal.SIGTERM, LAST_WORDS_S), (signal.SIGKILL, LAST_WORDS_S)):
            if not _signal_group(self._process.pid, number):
                return
            deadline_s = time.monotonic() + patience_s
            while _signal_group(self._process.pid, 0) and time.monotonic() < deadline_s:
                self._process.poll()
                time.sleep(0.05)


def _signal_group(group: int, number: int) -> bool:
    """Whether the process group still has a member to signal."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
