"""Hashes of a file's blocks, so that a part of it can be checked without reading the rest.

XXH3 with 64 bits (xxhash.com; what checkpoints use too): ten times as fast as SHA-256 where that has no instructions
of its own, and this is about damage and mix-ups, not about forgery.  Hashes of a terabyte take 2 MB.
"""

import base64
from typing import Protocol

import xxhash

BLOCK_BYTES = 1 << 22
HASH_BYTES = 8
PIECE_BYTES = (
    1 << 18
)  # hashed at once: xxhash keeps Python's lock, so other threads wait as long as this takes


class Digest(Protocol):
    """A `hashlib` or `xxhash` object."""

    def update(self, data: memoryview, /) -> None: ...


def update_in_pieces(digest: Digest, data: memoryview) -> None:
    for start in range(0, len(data), PIECE_BYTES):
        digest.update(data[start : start + PIECE_BYTES])


def block_hash(data: memoryview) -> bytes:
    digest = xxhash.xxh3_64()
    update_in_pieces(digest, data)
    return digest.digest()


class BlockHasher:
    """Takes a file's bytes in pieces of any size."""

    def __init__(self, block_bytes: int | None = None):
        self._block_bytes = block_bytes or BLOCK_BYTES
        self._hashes = bytearray()
        self._digest, self._filled = xxhash.xxh3_64(), 0

    def update(self, data: memoryview) -> None:
        data, done = data.cast("B"), 0
        while done < len(data):
            piece = data[done : done + self._block_bytes - self._filled]
            self._digest.update(piece)
            done, self._filled = done + len(piece), self._filled + len(piece)
            if self._filled == self._block_bytes:
                self._end_block()

    def hashes(self) -> bytes:
        """`HASH_BYTES` for each block; the last one may be short.  Nothing can be added afterwards."""
        if self._filled:
            self._end_block()
        return bytes(self._hashes)

    def _end_block(self) -> None:
        self._hashes += self._digest.digest()
        self._digest, self._filled = xxhash.xxh3_64(), 0


def to_text(hashes: bytes) -> str:
    return base64.b64encode(hashes).decode()


def from_text(text: str) -> bytes:
    """Raises ValueError where the text is none of `to_text`."""
    hashes = base64.b64decode(text, validate=True)
    if len(hashes) % HASH_BYTES:
        raise ValueError(f"{len(hashes)} bytes are no whole hashes")
    return hashes
