"""Folders that are either whole or not there.

A checkpoint is written under `step-000100.partial`, listed with sizes and hashes in its manifest, flushed to
disk and only then renamed to `step-000100`; `latest` is rewritten last, by rename too.  A folder is deleted by the
same road backwards.  So whatever moment a machine dies at, what carries a proper name is complete.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

from pretrain.checkpoint import manifest
from pretrain.checkpoint.manifest import MANIFEST, FileRecord
from pretrain.errors import RunError

# What stands in a checkpoint's folder: DeepSpeed's files, the weights, RunState, the run file, the tokenizer.
ENGINE, WEIGHTS, STATE, CONFIG, TOKENIZER = "deepspeed", "weights", "state.json", "run.yaml", "tokenizer"
LATEST = "latest"
PARTIAL = ".partial"
DAMAGED = ".damaged"


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


def complete(folder: Path, records: list[FileRecord]) -> Path:
    """Write the manifest, give the folder its proper name and point `latest` at it."""
    write_whole(folder / MANIFEST, manifest.to_text(records))
    final = folder.with_name(folder.name.removesuffix(PARTIAL))
    if final.exists() or final.is_symlink():
        remove(final)
    folder.rename(final)
    write_whole(final.parent / LATEST, final.name + "\n")
    return final


def write_whole(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old text or the new one, never half."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:  # a full disk
        beside.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary(*folders: Path) -> None:
    """What a process that was killed in `write_whole` has left; no other process may write there now."""
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


def meant(path: str | Path, *, key: str) -> list[Path]:
    """Those that will do, the best first: of a run's folder all, of a checkpoint's own itself alone."""
    newest = wanted(path, key=key)
    return [newest] if newest == Path(path) else checkpoints(newest.parent)


def wanted(path: str | Path, *, key: str) -> Path:
    """The same; a `RunError` that names ``key`` where there is none."""
    folder = checkpoint_in(Path(path))
    if folder is None:
        raise RunError(
            f"{key}={path}: no checkpoint there; give a run's folder, or a step-... folder in its checkpoints"
        )
    return folder
