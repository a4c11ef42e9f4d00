"""The processes of one launch on this host, found by the mark in their environment and never by name.

`python -m launch.processes MARK stop|end` does on another host what the launcher does here.
"""

import os
import signal
import sys
import time
from collections.abc import Collection

import psutil

from launch import secret_files
from launch.env import LAUNCH_ID

KEEPER = "launch.keeper"
PATIENCE_S = 5.0
LOOK_AGAIN_S = 0.02  # psutil waits for zombies too, which their parents reap when they like


def marked(mark: str) -> list[psutil.Process]:
    """All processes of this user on this host that carry the mark, but for the one that asks.

    Hosts that are namespaces of one machine see each other's processes, and are told apart by their networks.
    """
    found, here = [], _network(os.getpid())
    for process in psutil.process_iter():
        try:
            is_ours = process.pid != os.getpid() and process.environ().get(LAUNCH_ID) == mark
            if is_ours and _network(process.pid) == here:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def has_keepers(mark: str) -> bool:
    """Whether ranks of the launch are at work here."""
    return any(_module(process) == KEEPER for process in marked(mark))


def stop(mark: str, *, but: Collection[int] = ()) -> set[int]:
    """Ask the ranks to finish their step, save and end, ``but`` those asked already; returns the keepers asked."""
    keepers = [process for process in marked(mark) if _module(process) == KEEPER and process.pid not in but]
    for keeper in keepers:
        _signal(keeper, signal.SIGTERM)
    return {keeper.pid for keeper in keepers}


def end(mark: str) -> int:
    """End all of them at once, and what they start meanwhile; returns how many would not go."""
    deadline_s = time.monotonic() + PATIENCE_S
    while left := marked(mark):
        for process in left:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(left, timeout=LOOK_AGAIN_S)
        if time.monotonic() > deadline_s:
            return len(left)
    return 0


def _network(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None


def _module(process: psutil.Process) -> str | None:
    """What it runs with `python -m`; the launchers name the keeper too, behind their own module."""
    try:
        words = process.cmdline()
        return words[words.index("-m") + 1]
    except (psutil.Error, ValueError, IndexError):
        return None


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return


def main(argv: list[str] | None = None) -> int:
    mark, what = sys.argv[1:] if argv is None else argv
    if what == "stop":
        print(len(stop(mark)))
        return 0
    secret_files.remove(mark)
    return 1 if end(mark) else 0


if __name__ == "__main__":
    sys.exit(main())
