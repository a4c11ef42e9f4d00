"""Writes a corpus in Megatron's indexed format as a stream: it holds some bytes per document, no tokens.

The checksums of both files are taken while writing, so a manifest costs no second pass.
"""

import hashlib
import mmap
from types import TracebackType
from typing import IO

import numpy as np

from data_tools.block_hashes import BLOCK_BYTES, BlockHasher, to_text
from data_tools.indexed import write_index
from data_tools.manifest import BlockRecord
from data_tools.staging import Staging, sync


class IndexedWriter:
    """Writes into a staging folder; ``staging.publish()`` after the ``with`` block makes it a corpus."""

    def __init__(self, staging: Staging, *, dtype: np.dtype):
        self.dtype = np.dtype(dtype)
        self.num_tokens = 0
        self.num_documents = 0
        self.bin_sha256 = ""
        self.idx_sha256 = ""
        self._index_path = staging.path(".idx")
        self._data: IO[bytes] = open(staging.path(".bin"), "wb")  # noqa: SIM115 (closed in __exit__)
        self.blocks: BlockRecord | None = None
        self._hash, self._block_bytes = hashlib.sha256(), BLOCK_BYTES
        self._blocks = BlockHasher(self._block_bytes)
        self._lengths: list[np.ndarray] = []  # tokens of each sequence
        self._sequences: list[np.ndarray] = []  # sequences of each document

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        self._data.close()

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents of ``lengths`` tokens, whose tokens follow one another in ``tokens``."""
        assert int(lengths.sum()) == len(tokens), (int(lengths.sum()), len(tokens))
        self.add_tokens(tokens)
        self.add_lengths(lengths, sequences=np.ones(len(lengths), np.int64))

    def add_tokens(self, tokens: np.ndarray) -> None:
        """Append tokens; `add_lengths` says, before or after, which documents they are."""
        assert tokens.dtype == self.dtype, (tokens.dtype, self.dtype)
        buffer = np.ascontiguousarray(tokens).data
        self._data.write(buffer)
        self._hash.update(buffer)
        self._blocks.update(buffer)
        self.num_tokens += len(tokens)

    def add_lengths(self, lengths: np.ndarray, *, sequences: np.ndarray) -> None:
        """Append sequences of ``lengths`` tokens to the index, and documents of so many ``sequences``."""
        self._lengths.append(lengths.astype(np.int32))
        self._sequences.append(sequences)
        self.num_documents += len(sequences)

    def _finish(self) -> None:
        sync(self._data)
        self.bin_sha256 = self._hash.hexdigest()
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        indices = np.concatenate([np.zeros(1, np.int64), *self._sequences]).cumsum()
        assert int(lengths.sum(dtype=np.int64)) == self.num_tokens, (
            "tokens and lengths were not added in step"
        )
        with open(self._index_path, "w+b") as stream:
            write_index(stream, dtype=self.dtype, lengths=lengths, document_indices=indices)
            sync(stream)
            blocks = BlockHasher(self._block_bytes)
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as whole, memoryview(whole) as view:
                self.idx_sha256 = hashlib.sha256(view).hexdigest()
                blocks.update(view)
        self.blocks = BlockRecord(
            block_bytes=self._block_bytes, idx=to_text(blocks.hashes()), bin=to_text(self._blocks.hashes())
        )
