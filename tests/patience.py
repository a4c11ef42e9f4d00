"""Time limits of tests, scaled by how slow this machine is now.

A limit ends what hangs; it must not end what is slow.  `slowness` is measured once, when a session of tests starts, and
the processes of the session inherit it.
"""

import os
import subprocess
import sys
import time

VARIABLE = "MEGALOOM_TESTS_SLOWNESS"
REFERENCE_S = 0.26  # `measured_s` on two quiet cores of the machine that the limits were chosen on
DEFAULT_LIMIT_S = 300.0  # of a test that states none
LEAST, MOST = 1.0, 20.0


def measured_s() -> float:
    """Seconds of a fixed piece of work: three processes at a time that start, import and compute."""
    code = "import json, decimal, asyncio; sum(i * i for i in range(1_000_000))"
    started_s = time.perf_counter()
    work = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    for process in work:
        process.wait()
    return time.perf_counter() - started_s


def slowness() -> float:
    """How many times longer work takes here than on the reference machine; at least 1."""
    known = os.environ.get(VARIABLE)
    if known is None:
        known = os.environ[VARIABLE] = f"{min(MOST, max(LEAST, measured_s() / REFERENCE_S)):.2f}"
    return float(known)


def patient_s(limit_s: float) -> float:
    """A time limit for this machine."""
    return limit_s * slowness()
