"""Folders that are either whole or not there.

A checkpoint is written under `step-000100.partial`, listed with sizes and hashes in its manifest, flushed to
disk and only then renamed to `step-000100`; `latest` is rewritten last, by rename too.  A folder is deleted by the
same road backwards.  So whatever moment a machine dies at, what carries a proper name is complete.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pretrain.errors import RunError

# What stands in a checkpoint's folder: DeepSpeed's files, the weights, RunState, the run file, the tokenizer.
ENGINE, WEIGHTS, STATE, CONFIG, TOKENIZER = "deepspeed", "weights", "state.json", "run.yaml", "tokenizer"
MANIFEST = "manifest.json"
LATEST = "latest"
PARTIAL = ".partial"
DAMAGED = ".damaged"
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    path: str  # relative to the checkpoint's folder
    bytes: int
    xxh3: str


def folder_name(step: int) -> str:
    return f"step-{step:07d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def partial_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete; left-overs of an earlier try are removed."""
    folder = root / (folder_name(step) + PARTIAL)
    _delete(folder)
    folder.mkdir(parents=True)
    return folder


def files_of(folder: Path) -> list[Path]:
    """All files of a checkpoint in a fixed order, the manifest left out."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def record(folder: Path, path: Path) -> FileRecord:
    """Size and hash of one file, which is flushed to disk on the way."""
    digest, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            size += len(block)
        os.fsync(file.fileno())
    return FileRecord(str(path.relative_to(folder)), size, digest.hexdigest())


def complete(folder: Path, records: list[FileRecord]) -> Path:
    """Write the manifest, give the folder its proper name and point `latest` at it."""
    listing = {"files": [vars(item) for item in sorted(records, key=lambda item: item.path)]}
    write_whole(folder / MANIFEST, json.dumps(listing, indent=1) + "\n")
    final = folder.with_name(folder.name.removesuffix(PARTIAL))
    if final.exists() or final.is_symlink():
        remove(final)
    folder.rename(final)
    write_whole(final.parent / LATEST, final.name + "\n")
    return final


def write_whole(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old text or the new one, never half."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary(*folders: Path) -> None:
    """What a process that was killed in `write_whole` has left; nobody else may write there now."""
    for folder in folders:
        for path in folder.glob("*.tmp"):
            if re.fullmatch(r".+\.\d+\.tmp", path.name):
                path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint; it loses its proper name first.  Of a link the link alone goes."""
    doomed = folder.with_name(folder.name + ".deleted" + PARTIAL)
    _delete(doomed)
    folder.rename(doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Whatever is there, if anything is; what links lead to stays (shutil.rmtree follows none below a folder)."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)


def set_aside(folder: Path) -> None:
    """Take a damaged checkpoint's proper name from it, but nothing else: someone may want to look at it."""
    aside = folder.with_name(folder.name + DAMAGED)
    _delete(aside)
    folder.rename(aside)


def prune(root: Path, keep_last: int) -> None:
    """Keep the newest ``keep_last`` checkpoints, and no left-overs of interrupted ones."""
    for folder in checkpoints(root)[keep_last:]:
        remove(folder)
    for leftover in root.glob(f"*{PARTIAL}"):
        with contextlib.suppress(OSError):  # it is tried again with the next checkpoint
            _delete(leftover)


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, the newest first."""
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def checkpoint_in(path: Path) -> Path | None:
    """The checkpoint that a user means: by its own folder, or the newest by its run's folder or `checkpoints`."""
    if (path / WEIGHTS).is_dir():
        return path
    return next((folder for root in (path, path / "checkpoints") for folder in checkpoints(root)), None)


def wanted(path: str | Path, *, key: str) -> Path:
    """The same; a `RunError` that names ``key`` where there is none."""
    folder = checkpoint_in(Path(path))
    if folder is None:
        raise RunError(
            f"{key}={path}: no checkpoint there; give a run's folder, or a step-... folder in its checkpoints"
        )
    return folder


def faults(folder: Path, *, share: int = 0, shares: int = 1, without: str | None = None) -> Iterator[str]:
    """What is wrong with a checkpoint.

    Of its files only every ``shares``-th is looked at, from ``share`` on, and none below the folder ``without``.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        yield f"no readable {MANIFEST}"
        return
    for item in listed[share::shares]:
        if without is not None and item["path"].startswith(f"{without}/"):
            continue
        path = folder / item["path"]
        if not path.is_file():
            yield f"{item['path']}: missing"
        elif (size := path.stat().st_size) != item["bytes"]:
            yield f"{item['path']}: {size} bytes instead of {item['bytes']}"
        elif record(folder, path).xxh3 != item["xxh3"]:
            yield f"{item['path']}: its content changed since it was written"
