"""Which process of which machine: to tell whether the one that left a file behind is still there.

A process number alone is given to another process some day, and means nothing on another machine or in another
container.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Identity:
    """A process, for as long as its machine is up."""

    host: str
    machine: str  # this start of the machine, and the namespace that numbers its processes
    pid: int
    started: str  # by the machine's own clock

    def is_alive(self) -> bool | None:
        """None where that cannot be told from here: it is of another machine or container."""
        here = this_process()
        if (self.host, self.machine) != (here.host, here.machine):
            return None
        return _started(self.pid) == self.started

    def is_elsewhere(self) -> bool:
        return self.is_alive() is None

    @classmethod
    def read(cls, values: Any) -> "Identity | None":
        """From a JSON's object; None if that is something else."""
        try:
            host, machine, started = (str(values[key]) for key in ("host", "machine", "started"))
            return cls(host, machine, int(values["pid"]), started)
        except (KeyError, TypeError, ValueError):
            return None


def this_process() -> Identity:
    pid = os.getpid()
    return Identity(socket.gethostname(), _machine(), pid, _started(pid) or "")


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return str(int(psutil.boot_time()))


def _started(pid: int) -> str | None:
    """None if there is no such process, or only what its parent has not noticed yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # proc(5): state, starttime
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        return str(int(psutil.Process(pid).create_time()))
    except psutil.Error:
        return None
