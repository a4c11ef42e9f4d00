"""Zstandard-compressed text and JSON lines.

Not `zstandard.stream_reader`: a file that was cut short ends for it as if all were well (seen with 0.25).
"""

import io
from collections.abc import Iterator
from typing import IO

import zstandard

from data_tools.documents import Block
from data_tools.readers.plain import cut
from data_tools.readers.source import BLOCK_BYTES, ReadOptions, Source


def blocks(source: Source, options: ReadOptions) -> Iterator[Block]:
    """Blocks of a ``.zst`` file; several frames one after another are read through."""
    with open(source.name, "rb") as raw:
        stream = io.BufferedReader(_Frames(raw), buffer_size=BLOCK_BYTES)
        yield from cut(stream, source, options, position=raw.tell, faults=(zstandard.ZstdError,))


class _Frames(io.RawIOBase):
    """The decompressed bytes of all frames of a file; a last frame without its end is an error."""

    def __init__(self, raw: IO[bytes]):
        self._raw = raw
        self._ready = memoryview(b"")  # decompressed
        self._rest = b""  # of the next frame, compressed
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._ready and self._advance():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _advance(self) -> bool:
        """Decompress one more piece; False at the end of the file."""
        piece = self._rest or self._raw.read(zstandard.DECOMPRESSION_RECOMMENDED_INPUT_SIZE)
        if not piece:
            if self._frame is not None:
                raise zstandard.ZstdError("the file ends within a frame")
            return False
        self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
        self._ready = memoryview(self._frame.decompress(piece))
        self._rest = b""
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None
        return True
