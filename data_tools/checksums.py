"""SHA-256 of a run's inputs, taken in a thread beside the real work, so that the manifest costs no time."""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from threading import Event
from types import TracebackType

from data_tools.corpora import data_files
from data_tools.manifest import InputRecord
from data_tools.readers.source import Source

PIECE_BYTES = 1 << 22


class Checksums:
    """``with Checksums(sources) as checksums: ...; checksums.records()`` waits for what is not done yet."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checksums")
        self._stop = Event()
        self._records: Future[tuple[InputRecord, ...]] | None = None

    def __enter__(self) -> "Checksums":
        self._records = self._thread.submit(self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.shutdown(wait=True)

    def records(self) -> tuple[InputRecord, ...]:
        assert self._records is not None
        return self._records.result()

    def _take(self) -> tuple[InputRecord, ...]:
        records: list[InputRecord] = []
        for group, sources in groupby(self._sources, key=lambda source: source.group):
            if group is None:
                records += map(self._record, sources)
            else:
                records.append(_together(group, [self._record(source) for source in sources]))
        return tuple(records)

    def _record(self, source: Source) -> InputRecord:
        parts = [self._digest(file) for file in data_files(source)]
        digest = parts[0][0] if len(parts) == 1 else _combine(sha for sha, _ in parts)
        return InputRecord(
            path=source.name, bytes=sum(size for _, size in parts), sha256=digest, files=len(parts)
        )

    def _digest(self, path: str) -> tuple[str, int]:
        digest, size_bytes = hashlib.sha256(), 0
        with open(path, "rb") as stream:
            while not self._stop.is_set() and (piece := stream.read(PIECE_BYTES)):
                digest.update(piece)
                size_bytes += len(piece)
        return digest.hexdigest(), size_bytes


def _together(name: str, records: list[InputRecord]) -> InputRecord:
    digest = _combine(record.sha256 for record in records)
    return InputRecord(
        path=name, bytes=sum(record.bytes for record in records), sha256=digest, files=len(records)
    )


def _combine(digests: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
