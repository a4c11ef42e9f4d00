"""Megatron's indexed corpus format, without torch: ``PREFIX.bin`` holds tokens, ``PREFIX.idx`` their places.

Layout of the index (megatron/core/datasets/indexed_dataset.py, class _IndexWriter), little-endian:

    9 bytes  b"MMIDIDX\\0\\0"     8  version = 1     1  dtype code     8  sequences     8  documents + 1
    int32 [sequences]     lengths in tokens
    int64 [sequences]     where each begins in the data, in bytes
    int64 [documents + 1] the first sequence of each document

What surprises: a document is a run of *sequences* (BERT corpora keep one per sentence; ours keep one per
document), and the count in the header is one more than the number of documents.
"""

import os
import struct
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_tools.appended_ends import find_appended_ends
from data_tools.errors import DataError
from data_tools.index_arrays import counts_up

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
DTYPE_OF_CODE: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
UINT16_VOCAB_LIMIT = 65500  # DType.optimal_dtype of the file above


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that Megatron would choose for token ids below ``vocab_size``."""
    return np.dtype(np.uint16) if vocab_size < UINT16_VOCAB_LIMIT else np.dtype(np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def write_index(
    stream: BinaryIO, *, dtype: np.dtype, lengths: np.ndarray, document_indices: np.ndarray
) -> None:
    """Write an index for sequences of ``lengths`` tokens that lie one after another in the data file."""
    stream.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], len(lengths), len(document_indices)))
    stream.write(np.ascontiguousarray(lengths, dtype="<i4").data)
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], dtype="<i8", out=pointers[1:])
    pointers *= dtype.itemsize
    stream.write(pointers.data)
    stream.write(np.ascontiguousarray(document_indices, dtype="<i8").data)


class IndexedReader:
    """A corpus on disk, memory-mapped: opening reads the index's header and lengths, reading only the pages touched.

    Whether the index is right is another matter: `index_check`.
    """

    def __init__(self, prefix: str | Path, *, appended_ends: bool = True):
        """``appended_ends``: whether the lengths may leave out what ends documents (`appended_ends`)."""
        self.prefix = str(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise DataError(_missing(str(prefix), path))
        self.dtype, num_sequences, num_entries = _read_header(idx_path(prefix))
        index = np.memmap(idx_path(prefix), mode="r", dtype=np.uint8).view(np.ndarray)
        self._check_index_size(index.size, num_sequences, num_entries)

        pointers_at = HEADER.size + 4 * num_sequences
        documents_at = pointers_at + 8 * num_sequences
        self.sequence_lengths = np.frombuffer(index, "<i4", num_sequences, HEADER.size)
        self.sequence_pointers = np.frombuffer(index, "<i8", num_sequences, pointers_at)
        self.document_indices = np.frombuffer(index, "<i8", num_entries, documents_at)
        self.data_bytes = os.path.getsize(bin_path(prefix))
        self.tokens = _map_tokens(bin_path(prefix), self.dtype, self.data_bytes)
        self.appended_end: int | None = None  # the id that ends documents where the index leaves it out
        self._check_data_size()
        if appended_ends and len(self.tokens) > self.num_tokens:
            self._take_appended_ends()

    @property
    def num_documents(self) -> int:
        return max(0, len(self.document_indices) - 1)

    @cached_property
    def num_tokens(self) -> int:
        return int(self.sequence_lengths.sum(dtype=np.int64))

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document: [documents], without a copy where each document is one sequence."""
        if self._one_sequence_each:
            return self.sequence_lengths
        ends = np.concatenate([[0], np.cumsum(self.sequence_lengths, dtype=np.int64)])
        return np.diff(ends[self.document_indices])

    def document_start(self, document: int) -> int:
        """Where a document that is not empty begins in ``tokens``."""
        return int(self.sequence_pointers[self.document_indices[document]]) // self.dtype.itemsize

    def document(self, document: int) -> np.ndarray:
        """A document's tokens: a view of the mapped file."""
        first, last = self.document_indices[document], self.document_indices[document + 1]
        if first == last:
            return self.tokens[:0]
        start = self.document_start(document)
        return self.tokens[start : start + int(self.sequence_lengths[first:last].sum(dtype=np.int64))]

    def locate(self, token: int) -> tuple[int, int]:
        """The document that holds a token of the data, and how many of its tokens come before it."""
        at_bytes = token * self.dtype.itemsize
        sequence = int(np.searchsorted(self.sequence_pointers, at_bytes, side="right")) - 1
        document = int(np.searchsorted(self.document_indices, sequence, side="right")) - 1
        return document, token - self.document_start(document)

    @cached_property
    def _one_sequence_each(self) -> bool:
        return self.num_documents == len(self.sequence_lengths) and counts_up(self.document_indices)

    def _take_appended_ends(self) -> None:
        found = find_appended_ends(
            self.tokens, self.sequence_lengths, self.sequence_pointers, self.document_indices
        )
        if found is not None:
            self.appended_end, self.sequence_lengths, self.sequence_pointers = found
            del self.num_tokens

    def _check_index_size(self, found_bytes: int, num_sequences: int, num_entries: int) -> None:
        expected_bytes = HEADER.size + 12 * num_sequences + 8 * num_entries
        # A multimodal corpus of Megatron's appends one mode byte per sequence.
        if found_bytes not in (expected_bytes, expected_bytes + num_sequences):
            raise DataError(
                f"corpus={self.prefix}: the index has {found_bytes} bytes, its header promises "
                f"{expected_bytes}: it was cut short or overwritten; prepare the corpus again"
            )

    def _check_data_size(self) -> None:
        if not len(self.sequence_lengths):
            return
        needed_bytes = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        found_bytes = self.tokens.nbytes
        if found_bytes < needed_bytes:
            raise DataError(
                f"corpus={self.prefix}: the data file has {found_bytes} bytes, its index needs "
                f"{needed_bytes}: a copy was cut short, or they are of two runs; copy or prepare it again"
            )


def _map_tokens(path: Path, dtype: np.dtype, data_bytes: int) -> np.ndarray:
    num_tokens = data_bytes // dtype.itemsize
    if not num_tokens:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, mode="r", dtype=dtype, shape=(num_tokens,)).view(np.ndarray)


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    with open(path, "rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError(
            f"index={path} is not Megatron's indexed format: prepare the corpus with `megaloom prepare`"
        )
    _, version, code, num_sequences, num_entries = HEADER.unpack(head)
    if version != VERSION or code not in DTYPE_OF_CODE:
        raise DataError(
            f"index={path} has version={version}, dtype code={code}; known are version {VERSION} and the "
            f"integer codes {', '.join(map(str, DTYPE_OF_CODE))}: prepare the corpus again"
        )
    return np.dtype(DTYPE_OF_CODE[code]), num_sequences, num_entries


def _missing(prefix: str, path: Path) -> str:
    if Path(f"{prefix}.partial").exists():
        return (
            f"corpus={prefix} is not finished: its preparation is still running or was interrupted "
            f"(run the same `megaloom prepare` again)"
        )
    return f"corpus={prefix}: no file {path}; give the prefix that `megaloom prepare --out PREFIX` wrote"
