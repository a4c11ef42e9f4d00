"""What killed launches leave goes with the next one, and nothing else does."""

import json
import mmap
import os
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch import leftovers
from launch.leftovers import OWNER, remove_leftovers, scratch_folder
from pretrain.identity import Identity, this_process


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    return tmp_path


def left_by(owner: Identity | None, name: str, folder: Path, *, age_s: float = 0.0) -> Path:
    made = folder / name
    made.mkdir()
    (made / "hostfile").write_text("a slots=1\n")
    if owner is not None:
        (made / OWNER).write_text(json.dumps(asdict(owner)))
    os.utime(made, (time.time() - age_s,) * 2)
    return made


def test_folders_of_launches_that_are_gone_are_removed(places: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    gone = replace(this_process(), pid=child.pid)
    removed = [
        left_by(gone, "megaloom-launch-a", places),
        left_by(gone, "megaloom-parity-b", places),
        left_by(None, "megaloom-launch-c", places, age_s=4000.0),
    ]
    kept = [
        left_by(None, "megaloom-launch-d", places),
        left_by(replace(gone, host="node7"), "megaloom-launch-e", places),
        left_by(gone, "another-launch", places),
    ]
    (places / "megaloom-launch-link").symlink_to(places / "another-launch")
    with scratch_folder("launch") as mine:
        remove_leftovers()
        assert mine.is_dir()
    assert not any(folder.exists() for folder in [*removed, mine])
    assert all((folder / "hostfile").exists() for folder in kept)


def test_shared_memory_that_no_process_holds_is_removed(places: Path) -> None:
    shared = places / "shm"
    for name in ("nccl-held", "nccl-left", "nccl-new", "others"):
        (shared / name).write_bytes(b"x" * 4096)
        os.utime(shared / name, (time.time() - 100,) * 2)
    os.utime(shared / "nccl-new")
    with (shared / "nccl-held").open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        remove_leftovers()
    assert sorted(path.name for path in shared.iterdir()) == ["nccl-held", "nccl-new", "others"]
