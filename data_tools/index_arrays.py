"""What must hold between the arrays of an index, looked at a chunk at a time.

An index of a billion documents has 20 GB.  These functions read it once and allocate arrays of `CHUNK` elements.
"""

from collections.abc import Iterator

import numpy as np

CHUNK = 1 << 18  # elements; a few arrays of this size stay in a core's cache


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(count, start + CHUNK)) for start in range(0, count, CHUNK))


def _first(wrong: np.ndarray, start: int) -> int | None:
    """The first True, counted from the beginning of the whole array."""
    at = int(wrong.argmax())
    return start + at if wrong[at] else None


def first_wrong_sequence(lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> tuple[int, str] | None:
    """The first sequence with a negative length, or that does not begin where the one before it ends."""
    begin_bytes = 0
    for part in _chunks(len(lengths)):
        some = lengths[part]
        if some.min() < 0:
            return part.start + int((some < 0).argmax()), "has a negative length"
        ends = np.cumsum(some, dtype=np.int64)
        ends *= itemsize
        ends += begin_bytes
        if pointers[part.start] != begin_bytes:
            return part.start, "does not begin where the one before it ends"
        if (
            at := _first(pointers[part][1:] != ends[:-1], part.start + 1) if len(ends) > 1 else None
        ) is not None:
            return at, "does not begin where the one before it ends"
        begin_bytes = int(ends[-1])
    return None


def first_wrong_document(documents: np.ndarray, num_sequences: int) -> int | None:
    """The first entry that breaks the order 0 <= ... <= num_sequences, which begins and ends with these two."""
    if not len(documents) or documents[0] != 0:
        return 0
    for part in _chunks(len(documents) - 1):
        at = _first(documents[part] > documents[part.start + 1 : part.stop + 1], part.start + 1)
        if at is not None:
            return at
    return None if documents[-1] == num_sequences else len(documents) - 1


def counts_up(documents: np.ndarray) -> bool:
    """Whether the entries are 0, 1, 2, ...: each document is one sequence."""
    return all(
        np.array_equal(documents[part], np.arange(part.start, part.stop)) for part in _chunks(len(documents))
    )


def num_without_sequences(documents: np.ndarray) -> int:
    """Documents that hold no sequence."""
    return sum(
        int((documents[part] == documents[part.start + 1 : part.stop + 1]).sum())
        for part in _chunks(len(documents) - 1)
    )
