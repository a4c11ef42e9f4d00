"""A checkpoint's manifest: every file with its size and hash, and a hash of the list itself.

Whatever loading reads is in the list and inside the folder, or the checkpoint is damaged.  A folder may come from
anybody: nothing here follows a path or a link out of it, and no text of it is parsed before its hash is checked.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

MANIFEST = "manifest.json"
FORMAT = 2
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    path: str  # relative to the checkpoint's folder
    bytes: int
    xxh3: str


class Damage(Exception):
    """A checkpoint is not what its manifest says; the text says in what."""


def files_of(folder: Path) -> list[Path]:
    """All files of a checkpoint in a fixed order, the manifest left out."""
    found = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path != folder / MANIFEST)


def record(folder: Path, path: Path) -> FileRecord:
    """Size and hash of one file, which is flushed to disk on the way."""
    digest, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            size += len(block)
        os.fsync(file.fileno())
    return FileRecord(path.relative_to(folder).as_posix(), size, digest.hexdigest())


def to_text(records: Sequence[FileRecord]) -> str:
    """The manifest of these files."""
    files = [asdict(item) for item in sorted(records, key=lambda item: item.path)]
    return json.dumps({"format": FORMAT, "xxh3": _digest(files), "files": files}, indent=1) + "\n"


def read(folder: Path) -> dict[str, FileRecord]:
    """The files that a checkpoint consists of, by path.

    Raises:
        Damage: there is no manifest, it is not one, or it was changed since it was written.
    """
    try:
        raw = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        raise Damage(f"no readable {MANIFEST}") from None
    files = raw.get("files") if isinstance(raw, dict) else None
    if not isinstance(files, list) or raw.get("format") != FORMAT or raw.get("xxh3") != _digest(files):
        raise Damage(f"{MANIFEST} was changed since it was written, or is of another version")
    return {item.path: item for item in map(_parsed, files)}


def faults(folder: Path, *, share: int = 0, shares: int = 1, without: str | None = None) -> Iterator[str]:
    """What is wrong with a checkpoint.

    Of its files only every ``shares``-th is looked at, from ``share`` on, and none below the folder ``without``; what
    is there and not listed is told by the first share.
    """
    try:
        listed = read(folder)
    except Damage as damage:
        yield str(damage)
        return
    wanted = [item for item in listed.values() if not _is_below(item.path, without)]
    if share == 0:
        names = (path.relative_to(folder).as_posix() for path in files_of(folder))
        for name in names:
            if name not in listed and not _is_below(name, without):
                yield f"{name}: not listed in {MANIFEST}"
    for item in wanted[share::shares]:
        fault = _file_fault(folder, item)
        if fault is not None:
            yield fault


def verified_text(folder: Path, name: str) -> str:
    """A small text file of a checkpoint, if it is what the manifest says.

    Raises:
        Damage: it is not.
    """
    item = read(folder).get(name)
    if item is None:
        raise Damage(f"{name}: not listed in {MANIFEST}")
    fault = _file_fault(folder, item)
    if fault is not None:
        raise Damage(fault)
    return (folder / name).read_text("utf-8")


def _file_fault(folder: Path, item: FileRecord) -> str | None:
    path = folder / item.path
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{item.path}: a link that leads out of the checkpoint"
    if not path.is_file():
        return f"{item.path}: missing"
    size = path.stat().st_size
    if size != item.bytes:
        return f"{item.path}: {size} bytes instead of {item.bytes}"
    if record(folder, path).xxh3 != item.xxh3:
        return f"{item.path}: its content changed since it was written"
    return None


def _parsed(raw: Any) -> FileRecord:
    """One entry: its types, and a path that stays inside."""
    if not isinstance(raw, dict) or raw.keys() != {"path", "bytes", "xxh3"}:
        raise Damage(f"{MANIFEST}: an entry is not path, bytes and xxh3")
    path, size, digest = raw["path"], raw["bytes"], raw["xxh3"]
    if not (isinstance(path, str) and isinstance(digest, str) and type(size) is int):
        raise Damage(f"{MANIFEST}: an entry is not path, bytes and xxh3")
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise Damage(f"{MANIFEST}: {path!r} leads out of the checkpoint")
    return FileRecord(path, size, digest)


def _digest(files: Any) -> str:
    return xxhash.xxh3_64(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _is_below(path: str, folder: str | None) -> bool:
    return folder is not None and path.startswith(f"{folder}/")
