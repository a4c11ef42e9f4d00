"""Locks that a killed compilation left behind.

torch serialises the just-in-time builds of DeepSpeed's kernels by a file named `lock`.  A process that is killed
while it compiles leaves it there, and every later run waits for it for ever, without a word.
"""

import logging
import os
import time
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger(__name__)

YOUNG_S = 120.0  # a younger lock may belong to a build on another machine that shares this folder


def clear_stale_build_locks() -> list[Path]:
    """Remove old locks of builds that no process of this machine works on; returns them."""
    locks = extensions_root().glob("**/lock")
    stale = [lock for lock in locks if _age_s(lock) > YOUNG_S and not _is_worked_in(lock.parent)]
    for lock in stale:
        log.warning("removing %s, left by a build that was killed", lock)
        lock.unlink(missing_ok=True)
    return stale


def extensions_root() -> Path:
    """Where torch keeps what it compiled."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _age_s(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except OSError:
        return 0.0


def _is_worked_in(folder: Path) -> bool:
    """ninja and the compilers run in the build's folder."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                return True
        except (psutil.Error, OSError):
            continue
    return False
