"""Folders that a run swaps to, held so that no other run on the host uses them.

DeepSpeed's files there have no run's name: a second start with the same ``nvme_path`` removes the first one's
parameters (deepspeed/runtime/swap_tensor/partitioned_param_swapper.py) and writes over its moments.
"""

import fcntl
import socket
from pathlib import Path
from typing import IO, Any

from pretrain.engine.groups import Groups
from pretrain.errors import RunError
from pretrain.nested import get

_held: dict[Path, IO[str]] = {}  # until this process ends; the system lets go of them if it is killed


def hold_folders(document: dict[str, Any], groups: Groups) -> None:
    """Those that a complete JSON names for this rank's offload; every rank calls it."""
    sections = (f"zero_optimization.{name}" for name in ("offload_param", "offload_optimizer"))
    folders = {
        str(get(document, f"{section}.nvme_path"))
        for section in sections
        if get(document, f"{section}.device") == "nvme"
    }
    faults = (fault for folder in sorted(folders) if (fault := _hold(Path(folder), groups.rank)) is not None)
    told = groups.first_told(next(faults, None)) if folders else None
    if told is not None:
        raise RunError(told)


def _hold(folder: Path, rank: int) -> str | None:
    """What stands against it."""
    path = (folder / f"megaloom.rank{rank}.lock").resolve()
    if path in _held:
        return None
    where = f"nvme_path={folder} on {socket.gethostname()}"
    try:
        file = path.open("w")
    except OSError as fault:
        return f"{where}: cannot be written ({fault.strerror}); give a folder that can"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return f"{where}: another run swaps to it; give each run a folder of its own"
    _held[path] = file
    return None
