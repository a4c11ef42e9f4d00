"""What launches that were killed have left on this machine, removed by the next one: folders in /tmp, shared memory."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from pretrain.identity import Identity, this_process

PREFIX = "megaloom-"
OWNER = "owner.json"
PURPOSES = ("launch", "parity")
SHARED_MEMORY = Path("/dev/shm")
SHARED = ("nccl-*", "sem.mp-*")  # of NCCL, and semaphores of Python's processes
OLD_S, UNKNOWN_OLD_S = 60.0, 3600.0


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A folder for this process alone, gone at the end; if the process is killed, with the next launch."""
    assert purpose in PURPOSES
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{purpose}-") as name:
        (Path(name) / OWNER).write_text(json.dumps(asdict(this_process())), "utf-8")
        yield Path(name)


def remove_leftovers() -> None:
    """Of this user, and only what no running process can still use."""
    temporary = Path(tempfile.gettempdir())
    for purpose in PURPOSES:
        for folder in temporary.glob(f"{PREFIX}{purpose}-*"):
            if _is_ours(folder) and folder.is_dir() and _is_left(folder):
                shutil.rmtree(folder, ignore_errors=True)
    found = [path for pattern in SHARED for path in SHARED_MEMORY.glob(pattern) if _is_ours(path)]
    old = [path for path in found if _age_s(path) > OLD_S]
    mapped = _mapped() if old else ""
    for path in old:
        if f"{path}\n" not in mapped:
            with contextlib.suppress(OSError):
                path.unlink()


def _is_left(folder: Path) -> bool:
    try:
        owner = Identity.read(json.loads((folder / OWNER).read_text("utf-8")))
    except (OSError, ValueError):
        owner = None
    alive = owner.is_alive() if owner is not None else None
    return _age_s(folder) > UNKNOWN_OLD_S if alive is None else not alive


def _is_ours(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.lstat().st_uid == os.getuid() and not path.is_symlink()
    return False


def _age_s(path: Path) -> float:
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime
    return 0.0


def _mapped() -> str:
    """The files that processes hold in their memory, a line each."""
    texts = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            texts.append(maps.read_text(errors="replace"))
    return "".join(texts)
