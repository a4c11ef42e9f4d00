"""Files that are written aside and appear all at once, so that nothing half-written looks finished.

A corpus is built inside the folder ``PREFIX.partial/`` and moved out at the end, its ``.idx`` last: a pair of
``.bin`` and ``.idx`` is a finished corpus whenever the process was killed.  The folder is locked while it is
in use, so two runs cannot write one corpus; the lock dies with its process, so a killed run leaves no lock.
"""

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from data_tools.errors import DataError

LAST_SUFFIX = ".idx"
LOCK_NAME = "lock"


class Staging:
    """The folder ``PREFIX.partial/`` while a corpus is written; removed on leaving, whatever happened."""

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        self.folder = Path(f"{prefix}.partial")
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> "Staging":
        self._check_name()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / LOCK_NAME, "wb")
        except OSError as error:
            raise DataError(
                f"out={self.prefix} cannot be written ({error.strerror}): choose another place"
            ) from None
        self._take_lock()
        for leftover in self.folder.iterdir():
            if leftover.name != LOCK_NAME:
                _remove(leftover)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def path(self, suffix: str) -> Path:
        """Where to write what will become ``PREFIX`` + ``suffix``."""
        return self.folder / (Path(self.prefix).name + suffix)

    def publish(self) -> None:
        """Move everything to its place.  The old index goes first and the new one comes last."""
        self._final(LAST_SUFFIX).unlink(missing_ok=True)
        suffixes = [path.name.removeprefix(Path(self.prefix).name) for path in sorted(self.folder.iterdir())]
        for suffix in suffixes:
            if suffix not in (LOCK_NAME, LAST_SUFFIX):
                _remove(self._final(suffix))
                os.rename(self.path(suffix), self._final(suffix))
        sync_folder(self.folder.parent)
        os.rename(self.path(LAST_SUFFIX), self._final(LAST_SUFFIX))
        sync_folder(self.folder.parent)

    def _final(self, suffix: str) -> Path:
        return Path(self.prefix + suffix)

    def _check_name(self) -> None:
        if self.prefix.endswith("/") or Path(self.prefix).name in ("", ".."):
            raise DataError(
                f"out={self.prefix} is a folder: name a corpus in it, such as {Path(self.prefix) / 'corpus'}"
            )
        for suffix in (".bin", LAST_SUFFIX):
            if self.prefix.endswith(suffix):
                raise DataError(
                    f"out={self.prefix} is a file: leave {suffix} out, a corpus has several files"
                )

    def _take_lock(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise DataError(
                f"out={self.prefix} is being written by another process: wait for it, or choose another"
            ) from None
        except OSError:
            pass  # some network file systems have no locks; the writer is then the user's responsibility


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees either the old content or all of the new."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "wb") as stream:
            stream.write(data)
            sync(stream)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync(stream: IO[bytes]) -> None:
    """Wait until the written bytes are on the disk, so that a rename cannot overtake them."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # not every file system can sync a folder; the rename itself is still atomic
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
