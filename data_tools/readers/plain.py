"""Text and JSON lines, as they are or gzipped: cut into blocks of whole records.

A ``.txt`` file is one document unless the user asks for lines or paragraphs: splitting silently would tear
books apart, and a wiki dump in one file is easily cut with ``--txt-documents paragraph``.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import IO

from data_tools.documents import EMPTY, UNREADABLE, Block, Form, skipped
from data_tools.readers.source import BLOCK_BYTES, ReadOptions, Source, TxtDocuments

BinaryStream = IO[bytes] | gzip.GzipFile | io.BufferedReader
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def blocks(source: Source, options: ReadOptions) -> Iterator[Block]:
    """Blocks of an uncompressed file."""
    with open(source.name, "rb") as stream:
        yield from cut(stream, source, options, position=stream.tell)


def gzip_blocks(source: Source, options: ReadOptions) -> Iterator[Block]:
    """Blocks of a gzipped file; several members one after another are read through."""
    with open(source.name, "rb") as raw, gzip.GzipFile(fileobj=raw) as stream:
        yield from cut(
            stream, source, options, position=raw.tell, faults=(EOFError, zlib.error, gzip.BadGzipFile)
        )


def cut(
    stream: BinaryStream,
    source: Source,
    options: ReadOptions,
    *,
    position: Callable[[], int],
    faults: tuple[type[Exception], ...] = (),
) -> Iterator[Block]:
    """Cut a stream at record ends; one of ``faults`` while reading becomes a block that says so."""
    form = _form(source, options)
    line, done_bytes = 1, 0
    try:
        for payload in _PIECES[form](stream):
            payload = payload.removeprefix(BYTE_ORDER_MARK) if line == 1 else payload
            yield Block(source.name, line, form, payload, position() - done_bytes)
            line += payload.count(b"\n")
            done_bytes = position()
        if not done_bytes:
            yield skipped(source.name, 1, EMPTY, "the file")
    except faults as error:
        yield skipped(source.name, line, UNREADABLE, str(error) or type(error).__name__)


def _form(source: Source, options: ReadOptions) -> Form:
    if source.is_json:
        return "json"
    if source.one_document:
        return "text"
    return _FORMS[options.txt_documents]


def _whole(stream: BinaryStream) -> Iterator[bytes]:
    if text := stream.read():
        yield text


def _lines(stream: BinaryStream) -> Iterator[bytes]:
    while piece := stream.read(BLOCK_BYTES):
        yield piece + stream.readline()


def _paragraphs(stream: BinaryStream) -> Iterator[bytes]:
    while piece := stream.read(BLOCK_BYTES):
        lines = [piece, stream.readline()]
        while (line := stream.readline()).strip():
            lines.append(line)
        yield b"".join([*lines, line])


_FORMS: dict[TxtDocuments, Form] = {
    TxtDocuments.FILE: "text",
    TxtDocuments.LINE: "lines",
    TxtDocuments.PARAGRAPH: "paragraphs",
}
_PIECES: dict[str, Callable[[BinaryStream], Iterator[bytes]]] = {
    "text": _whole,
    "lines": _lines,
    "json": _lines,
    "paragraphs": _paragraphs,
}
