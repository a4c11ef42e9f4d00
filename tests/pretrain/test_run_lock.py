"""One run at a time in a folder: who holds it, who may take it, and what is left over."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pretrain import run_lock
from pretrain.errors import RunError
from pretrain.identity import Identity, this_process
from pretrain.run_lock import LOCK, RunLock, check_free, read, take
from tests.patience import patient_s

ELSEWHERE = Identity("node7", "another boot", 4711, "123")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "DYING_S", 0.3)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.2)
    monkeypatch.setattr(run_lock, "LOOK_AGAIN_S", 0.05)


def leave(folder: Path, process: Identity, *, age_s: float = 0.0, **facts: Any) -> Path:
    """A lock as another process has left it."""
    path = folder / LOCK
    content = {**asdict(process), "job": None, "token": "theirs", "since": "2026-01-01 00:00:00", **facts}
    path.write_text(json.dumps(content), "utf-8")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def gone() -> Identity:
    """A process of this machine that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return replace(this_process(), pid=child.pid)


def test_a_lock_is_there_while_it_is_held(tmp_path: Path) -> None:
    lock = take(tmp_path / "runs" / "r", "job1")
    holder = read(lock.path)
    assert holder is not None and holder.process == this_process() and holder.job == "job1"
    os.utime(lock.path, (0, 0))
    deadline_s = time.monotonic() + patient_s(10)
    while lock.path.stat().st_mtime == 0 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert lock.path.stat().st_mtime > time.time() - 60, "it is touched"
    lock.release()
    assert list((tmp_path / "runs" / "r").iterdir()) == []


def test_the_second_is_refused_and_learns_who_is_first(tmp_path: Path) -> None:
    lock = take(tmp_path, "job1")
    for attempt in (lambda: take(tmp_path, "job1"), lambda: take(tmp_path), lambda: check_free(tmp_path)):
        with pytest.raises(RunError) as refused:
            attempt()
        told = str(refused.value)
        assert told.startswith(
            f"name={tmp_path.name}: another run is at work in {tmp_path} (process {os.getpid()} on "
        )
        assert "job job1" in told and re.search(r"last heartbeat \d+ s ago", told) and "name=ANOTHER" in told
    lock.release()
    check_free(tmp_path)


def test_a_lock_of_a_process_that_is_gone_is_taken(tmp_path: Path) -> None:
    leave(tmp_path, gone())
    check_free(tmp_path)
    take(tmp_path).release()


def test_a_process_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    leave(tmp_path, replace(this_process(), started="1"))
    take(tmp_path).release()


def test_a_host_that_is_lost_keeps_its_lock_until_it_is_stale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, ELSEWHERE, age_s=run_lock.STALE_S - 1)
    before_s = time.monotonic()
    lock = take(tmp_path)
    assert time.monotonic() - before_s > 0.5, "it might have beaten still"
    assert "waiting until it is 60 s" in capsys.readouterr().err
    lock.release()


@contextlib.contextmanager
def beating(path: Path) -> Iterator[None]:
    """Somebody touches the lock."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()


def test_a_host_that_beats_keeps_its_lock(tmp_path: Path) -> None:
    path = leave(tmp_path, ELSEWHERE)
    with beating(path), pytest.raises(RunError, match="process 4711 on node7"):
        take(tmp_path)


def test_a_restart_takes_what_a_lost_host_of_its_own_job_holds(tmp_path: Path) -> None:
    leave(tmp_path, ELSEWHERE, job="job1")
    take(tmp_path, "job1").release()


def test_a_lock_that_cannot_be_read_is_one_until_it_is_old(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{", "utf-8")
    with beating(tmp_path / LOCK), pytest.raises(RunError, match="cannot be read"):
        take(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    take(tmp_path).release()


TAKER = """
import sys, time
from pathlib import Path
from pretrain import run_lock
run_lock.DYING_S = 0.2
folder, start_s = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0.0, start_s - time.time()))
try:
    run_lock.take(folder)
    print("mine", flush=True)
    sys.stdin.read()
except run_lock.RunError:
    print("refused", flush=True)
"""


def test_of_many_that_find_a_lock_left_over_one_gets_it(tmp_path: Path) -> None:
    leave(tmp_path, gone())
    start_s = f"{time.time() + 1.0}"
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", TAKER, str(tmp_path), start_s],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    told = [taker.stdout.readline().strip() for taker in takers if taker.stdout is not None]
    for taker in takers:
        taker.communicate(timeout=patient_s(20))
    assert sorted(told) == ["mine", *["refused"] * 7]


def test_without_file_locks_nobody_removes_the_lock_of_a_quicker_one(tmp_path: Path) -> None:
    """As on some network disks: it was judged left over, and is another's by now."""
    path = leave(tmp_path, this_process(), token="quicker")
    run_lock._remove(path, "judged")
    holder = read(path)
    assert holder is not None and holder.token == "quicker" and len(list(tmp_path.iterdir())) == 1


STOOD_STILL = """
import json, sys, time
from pathlib import Path
from pretrain import run_lock
run_lock.BEAT_S = 0.1
lock = run_lock.take(Path(sys.argv[1]))
content = json.loads(lock.path.read_text())
lock.path.write_text(json.dumps({**content, "token": "another", "pid": 1}))
time.sleep(60)
"""


def test_a_run_whose_place_was_taken_while_it_stood_still_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOOD_STILL, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=patient_s(50), check=False)
    assert ended.returncode == run_lock.TAKEN_AWAY
    assert "took this run's place" in ended.stderr


def test_releasing_leaves_the_lock_of_another(tmp_path: Path) -> None:
    path = leave(tmp_path, ELSEWHERE)
    lock = RunLock.__new__(RunLock)
    lock.path, lock.token, lock._released = path, "mine", threading.Event()
    lock.release()
    assert path.exists()


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file", "utf-8")
    with pytest.raises(RunError, match=r"^out=.*runs: .* cannot be written"):
        take(tmp_path / "runs" / "r")
