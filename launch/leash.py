"""Runs a launcher's command and ends it, with all that it started here, when whoever holds the leash is gone.

``python -m launch.leash COMMAND...``.  A `megaloom run` that is killed outright can tell nobody, and pdsh goes on
without a reader.  The kernel tells this process (prctl(2), PR_SET_PDEATHSIG), which leads the command's process group.
"""

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def hold(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def main(argv: list[str] | None = None) -> int:
    """The command's exit code, 128 and more for signals."""
    parent = os.getppid()

    def end(number: int, frame: FrameType | None) -> None:
        os.killpg(os.getpgrp(), signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    hold()
    if os.getppid() != parent:
        return 1
    code = subprocess.run(sys.argv[1:] if argv is None else argv, check=False).returncode
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
