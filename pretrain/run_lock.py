"""One run at a time in a run's folder: `lock.json` names the process that writes there, and shows that it lives.

The first rank takes it before anything is written, touches it every 10 s and removes it at the end.  A lock is left
over when its process is gone from its machine, or when no process touched it for 60 s.  Ages are differences of file
times of one disk, so clocks of different hosts do not matter.
"""

import contextlib
import fcntl
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from pretrain.errors import RunError
from pretrain.identity import Identity, this_process

LOCK = "lock.json"
BEAT_S, STALE_S = 10.0, 60.0
DYING_S = 3.0  # what ranks of a killed launch may take to end
LOOK_AGAIN_S = 0.2
TAKEN_AWAY = 70  # EX_SOFTWARE
JOB_ID = "MEGALOOM_JOB"  # of a `megaloom run`: its restarts may take the lock that a lost host has left


class Holder(NamedTuple):
    """What a lock says, and its age; ``process`` is None if it cannot be read."""

    process: Identity | None
    job: str | None
    token: str
    since: str
    age_s: float  # since it was touched

    def is_left_over(self, job: str | None) -> bool:
        """Whether a start of ``job`` may take it."""
        alive = self.process.is_alive() if self.process is not None else None
        if alive is False or self.age_s > STALE_S:
            return True
        return alive is None and job is not None and job == self.job


@dataclass
class RunLock:
    """A lock that this process holds."""

    path: Path
    token: str

    def __post_init__(self) -> None:
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def release(self) -> None:
        self._released.set()
        with contextlib.suppress(OSError), _one_at_a_time(self.path.parent):
            holder = read(self.path)
            if holder is not None and holder.token == self.token:
                self.path.unlink()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            holder = read(self.path)
            if holder is not None and holder.process is not None and holder.token != self.token:
                _end_at_once(self.path, holder)
            with contextlib.suppress(OSError):  # a disk that is away for a moment
                os.utime(self.path)


def check_free(folder: Path, job: str | None = None) -> None:
    """Before anything is started; the lock stays as it is.

    Raises:
        RunError: another run is at work in the folder, and which.
    """
    holder = read(folder / LOCK)
    if holder is not None and not _becomes_free(folder, holder, job):
        raise RunError(_refusal(folder, holder))


def take(folder: Path, job: str | None = None) -> RunLock:
    """Make the folder this process's own.

    Raises:
        RunError: another run is at work there, and which; or nothing can be written there.
    """
    path, token = folder / LOCK, uuid.uuid4().hex
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            with _one_at_a_time(folder):
                holder = read(path)
                if holder is None and _create(path, job, token):
                    return RunLock(path, token)
                if holder is not None and holder.is_left_over(job):
                    _remove(path, holder.token)
                    continue
            if holder is not None and not _becomes_free(folder, holder, job):
                raise RunError(_refusal(folder, holder))
    except OSError as fault:
        raise RunError(
            f"out={folder.parent}: {folder} cannot be written ({fault.strerror or fault})"
        ) from None


def read(path: Path) -> Holder | None:
    """None if there is no lock."""
    try:
        text, touched_s = path.read_text("utf-8"), path.stat().st_mtime
        age_s = _now_s(path.parent) - touched_s
    except (OSError, UnicodeDecodeError):
        return None if not path.exists() else Holder(None, None, "", "", 0.0)
    try:
        content = json.loads(text)
        return Holder(
            Identity.read(content), content.get("job"), str(content["token"]), str(content["since"]), age_s
        )
    except (ValueError, KeyError, AttributeError, TypeError):
        return Holder(None, None, "", "", age_s)


def _becomes_free(folder: Path, holder: Holder, job: str | None) -> bool:
    """Whether the lock is left over by now, or within the time that tells: ranks that die, a heartbeat that is due.

    Of a process on another machine only its heartbeat tells; while that stays out, it is waited for until it is stale.
    """
    path, began_s = folder / LOCK, time.monotonic()
    elsewhere = holder.process is None or holder.process.is_elsewhere()
    patience_s = 1.5 * BEAT_S if elsewhere else DYING_S
    touched_s, is_told = _touched_s(path), False
    while True:
        now = read(path)
        if now is None or now.is_left_over(job):
            return True
        has_beaten = _touched_s(path) != touched_s or now.token != holder.token
        if elsewhere and has_beaten:
            return False
        if time.monotonic() - began_s > patience_s:
            if not elsewhere or now.age_s < 1.5 * BEAT_S:
                return False
            if not is_told:
                is_told = True
                told = f"{path}: no heartbeat for {now.age_s:.0f} s; waiting until it is {STALE_S:.0f} s, to take it"
                print(told, file=sys.stderr, flush=True)
        time.sleep(LOOK_AGAIN_S)


def _create(path: Path, job: str | None, token: str) -> bool:
    """Whether it is there now, with all its content, and was not before."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    content = {**asdict(this_process()), "job": job, "token": token, "since": since}
    whole = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    whole.write_text(json.dumps(content) + "\n", "utf-8")
    try:
        os.link(whole, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # a disk without links
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(whole.read_text("utf-8"))
            return True
        except FileExistsError:
            return False
    finally:
        whole.unlink(missing_ok=True)


def _remove(path: Path, token: str) -> None:
    """The lock that was judged, and no other: where `_one_at_a_time` has no say, another process may be quicker."""
    aside = path.with_name(f"{path.name}.left.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        found = read(aside)
        if found is not None and found.token != token:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """While one process judges a lock, no other does; some network disks cannot promise that."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _now_s(folder: Path) -> float:
    """By the clock of the disk."""
    probe = folder / f"{LOCK}.now.{os.getpid()}.tmp"
    try:
        probe.touch()
        now_s = probe.stat().st_mtime
        probe.unlink()
        return now_s
    except OSError:
        return time.time()


def _touched_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _refusal(folder: Path, holder: Holder) -> str:
    way_out = "wait for it, stop it, or use another name (name=ANOTHER)"
    if holder.process is None:
        return (
            f"name={folder.name}: another run is at work in {folder} (its {LOCK} cannot be read); {way_out}"
        )
    job = f", job {holder.job}" if holder.job else ""
    who = f"process {holder.process.pid} on {holder.process.host}{job}, since {holder.since}"
    seen = f"last heartbeat {max(0.0, holder.age_s):.0f} s ago"
    return f"name={folder.name}: another run is at work in {folder} ({who}; {seen}); {way_out}"


def _end_at_once(path: Path, holder: Holder) -> NoReturn:
    assert holder.process is not None
    who = f"process {holder.process.pid} on {holder.process.host}"
    print(
        f"{path.parent}: {who} took this run's place while it stood still for more than {STALE_S:.0f} s; it ends, so "
        "that their files do not mix",
        file=sys.stderr,
        flush=True,
    )
    os._exit(TAKEN_AWAY)
