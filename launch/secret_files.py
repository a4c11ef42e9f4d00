"""Secrets of one launch on one host, such as WANDB_API_KEY: a file that only this user reads, gone once it was read.

DeepSpeed's runner puts exported variables into the command lines of pdsh and mpirun, which `ps` shows to everybody,
here and there.  So variables that hold secrets come over ssh's standard input instead, before the ranks start
(``python -m launch.secret_files MARK put``), and the keeper of each rank takes them from the file.  The last of a
host's ranks removes it; so does the end of the launch (`processes.py`).
"""

import contextlib
import fcntl
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

IN_FILE = "MEGALOOM_SECRETS_IN_FILE"  # names of variables that a keeper is to take from the file
IN_ENVIRONMENT = (
    "MEGALOOM_SECRETS"  # the variables themselves, as JSON, where a scheduler carries the environment
)
MEMORY = Path("/dev/shm")  # a disk would remember
FORGOTTEN_S = 3600.0  # a file that old is of a launch that was killed before its ranks started


def put(mark: str, values: Mapping[str, str]) -> None:
    """Write the file of this launch; those of launches that were killed long ago are removed.

    Raises:
        OSError: there is no folder that is this user's alone.
    """
    folder = _folder()
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > FORGOTTEN_S:
                path.unlink()
    number = os.open(folder / mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        json.dump({"readers": 0, "values": dict(values)}, file)


def take(mark: str, num_readers: int) -> dict[str, str]:
    """The variables; the last of ``num_readers`` processes of this host removes the file."""
    path = _folder() / mark
    with path.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        content = json.load(file)
        content["readers"] += 1
        if content["readers"] >= num_readers:
            path.unlink(missing_ok=True)
        else:
            file.seek(0)
            json.dump(content, file)
            file.truncate()
    return content["values"]


def remove(mark: str) -> None:
    with contextlib.suppress(OSError):
        (_folder() / mark).unlink()


def take_into(environment: MutableMapping[str, str], mark: str | None, num_readers: int) -> None:
    """Put the secrets that the environment speaks of into it.

    Raises:
        OSError: the file is not there, or not readable.
    """
    carried, names = environment.pop(IN_ENVIRONMENT, None), environment.pop(IN_FILE, None)
    if carried:
        environment.update(json.loads(carried))
    if names and mark:
        environment.update(take(mark, num_readers))


def _folder() -> Path:
    base = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    folder = base / f"megaloom-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise OSError(f"{folder}: is not a folder of this user alone (chmod 700, or remove it)")
    return folder


def main(argv: list[str] | None = None) -> int:
    mark, what = sys.argv[1:] if argv is None else argv
    assert what == "put", what
    try:
        put(mark, json.load(sys.stdin))
    except OSError as fault:
        print(fault, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
