"""Whether a corpus's files hold the bytes that were prepared: blocks of a file against the manifest's hashes.

A manifest of format 1 has one SHA-256 for each file, so its files can only be read from end to end.  Each fault is one
sentence that begins with the corpus.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_tools.block_hashes import BLOCK_BYTES, HASH_BYTES, block_hash, update_in_pieces
from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.indexed import bin_path, idx_path
from data_tools.manifest import Manifest

WAY_OUT = "copy the corpus again, or prepare it again (data.verify=off reads it as it is)"


def num_blocks(size_bytes: int, block_bytes: int) -> int:
    return -(-size_bytes // block_bytes)


def sample_of_blocks(count: int, most: int, *, seed: int) -> list[int]:
    """``most`` of ``count`` blocks, ascending: the first, the last, and others that the seed chooses."""
    if count <= most:
        return list(range(count))
    within = random.Random(seed).sample(range(1, count - 1), max(0, most - 2))
    return sorted({0, count - 1, *within})


def index_hash_fault(corpus: Corpus) -> str | None:
    """How the bytes of .idx differ from the manifest's hashes, if they do."""
    manifest = corpus.manifest
    if manifest is None:
        return None
    if manifest.blocks is None:
        with open(idx_path(corpus.prefix), "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() == manifest.idx_sha256:
                return None
        return f"corpus={corpus.prefix}: .idx is not what was prepared (its SHA-256 differs): {WAY_OUT}"
    return next(_faults_of_blocks(corpus, ".idx", None), None)


def bin_faults(corpus: Corpus, numbers: Iterable[int] | None = None) -> Iterator[str | None]:
    """What each block of .bin gives: None, or how it differs from the manifest's hash.  All blocks without ``numbers``.

    Of format 1, whose blocks have no hashes, the last one answers for the whole file.

    Raises:
        OSError: the file cannot be read.
    """
    manifest = corpus.manifest
    assert manifest is not None
    if manifest.blocks is not None:
        yield from _verdicts(corpus, ".bin", numbers)
        return
    digest, path = hashlib.sha256(), bin_path(corpus.prefix)
    for _, block in read_blocks(path, BLOCK_BYTES, range(num_blocks(path.stat().st_size, BLOCK_BYTES))):
        update_in_pieces(digest, block)
        yield None
    if digest.hexdigest() != manifest.bin_sha256:
        yield f"corpus={corpus.prefix}: .bin is not what was prepared (its SHA-256 differs): {WAY_OUT}"


def ids_fault(corpus: Corpus, vocab_size: int, numbers: Iterable[int]) -> str | None:
    """The first id beyond the vocabulary in these blocks of `BLOCK_BYTES` of .bin."""
    tokens, size = corpus.index.tokens, BLOCK_BYTES // corpus.index.dtype.itemsize
    for number in numbers:
        part = tokens[number * size : (number + 1) * size]
        if part.size and (part.max() >= vocab_size or part.min() < 0):
            at = number * size + int(((part >= vocab_size) | (part < 0)).argmax())
            return corpus.beyond_vocabulary(at, vocab_size)
    return None


def check_whole(corpus: Corpus) -> Iterator[None]:
    """Reads all of .bin; each item is a block that is right.

    Raises:
        DataError: a block is not what was prepared.
        OSError: the file cannot be read.
    """
    for fault in bin_faults(corpus):
        if fault is not None:
            raise DataError(fault)
        yield None


@contextmanager
def readable(corpus: Corpus) -> Iterator[None]:
    """Inside, a file of the corpus that cannot be read is a `DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError(unreadable(corpus, error)) from None


def unreadable(corpus: Corpus, error: OSError) -> str:
    return f"corpus={corpus.prefix} cannot be read ({error.strerror or error}): look at its disk, or copy it again"


def read_blocks(path: Path, block_bytes: int, numbers: Iterable[int]) -> Iterator[tuple[int, memoryview]]:
    """Blocks of a file, each valid until the next is asked for; short at the file's end."""
    buffer = memoryview(bytearray(block_bytes))
    with open(path, "rb", buffering=0) as stream:
        for number in numbers:
            stream.seek(number * block_bytes)
            filled = 0
            while filled < block_bytes and (count := stream.readinto(buffer[filled:])):
                filled += count
            yield number, buffer[:filled]


def _faults_of_blocks(corpus: Corpus, suffix: str, numbers: Iterable[int] | None) -> Iterator[str]:
    return (fault for fault in _verdicts(corpus, suffix, numbers) if fault is not None)


def _verdicts(corpus: Corpus, suffix: str, numbers: Iterable[int] | None) -> Iterator[str | None]:
    manifest, path = corpus.manifest, Path(f"{corpus.prefix}{suffix}")
    hashes, block_bytes = _hashes(manifest, suffix)
    found, listed = num_blocks(path.stat().st_size, block_bytes), len(hashes) // HASH_BYTES
    if found != listed:
        yield f"corpus={corpus.prefix}: {suffix} has {found} blocks, the manifest {listed} hashes: {WAY_OUT}"
        return
    for number, block in read_blocks(path, block_bytes, range(found) if numbers is None else numbers):
        fault, first = None, number * block_bytes
        if block_hash(block) != hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES]:
            fault = (
                f"corpus={corpus.prefix}: block {number} of {suffix} (bytes {first} to {first + len(block) - 1}) "
                f"is not what was prepared (its hash differs): {WAY_OUT}"
            )
        yield fault


def _hashes(manifest: Manifest | None, suffix: str) -> tuple[bytes, int]:
    assert manifest is not None and manifest.blocks is not None
    blocks = manifest.blocks
    return blocks.idx_hashes if suffix == ".idx" else blocks.bin_hashes, blocks.block_bytes


def first_difference(found: bytes, expected: bytes, block_bytes: int) -> str:
    """Where two files differ first, from the hashes of their blocks."""
    pairs: Sequence[np.ndarray] = [np.frombuffer(hashes, np.uint64) for hashes in (found, expected)]
    count = min(map(len, pairs))
    wrong = np.flatnonzero(pairs[0][:count] != pairs[1][:count])
    number = int(wrong[0]) if len(wrong) else count
    return f"first in block {number}, from byte {number * block_bytes} on"
