"""Arrays that are costly to compute, kept on disk for all processes of a machine or a cluster.

Every array here is a pure function of its name, so nothing can go wrong for good: a missing, torn or
foreign file is computed again, two processes that write at once write the same bytes, and a folder that
cannot be written only costs time.  The name of a file is the hash of everything that determines its
content.

    file = b"MLINDEX1", bytes that follow, their CRC-32; one line of JSON; the arrays at multiples of 64
"""

import contextlib
import json
import logging
import os
import struct
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from data_tools.staging import sync, sync_folder

logger = logging.getLogger(__name__)

MAGIC = b"MLINDEX1"
PREAMBLE = struct.Struct("<8sQI")
ALIGN_BYTES = 64
SECONDS_BETWEEN_LOOKS = 0.2
HEADER_LIMIT_BYTES = 1 << 12  # a name, a type and a shape for each of a handful of arrays

Arrays = dict[str, np.ndarray]


class IndexCache:
    """A folder of arrays by name."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.failed = False  # to write, at least once
        self._promised: dict[str, float] = {}  # name -> until when it is worth waiting for

    def get(self, name: str, build: Callable[[], Arrays]) -> Arrays:
        """The arrays called ``name``: from the disk if they are there and whole, else built and written."""
        found = self.load(name)
        while found is None and time.monotonic() < self._promised.get(name, 0.0):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            found = self.load(name)
        if found is not None:
            return found
        arrays = build()
        self.store(name, arrays)
        return arrays

    def promise(self, name: str, *, patience_s: float) -> None:
        """Another process has written ``name``: wait so long for it, since shared disks show files late."""
        self._promised[name] = time.monotonic() + patience_s

    def load(self, name: str) -> Arrays | None:
        """The mapped arrays of a file that is there and whole, else None."""
        try:
            return _read(self._path(name))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            logger.warning("index cache file %s is damaged (%s): built again", self._path(name), error)
            return None

    def store(self, name: str, arrays: Arrays) -> None:
        """Write aside, sync, rename; one warning where the folder cannot be written."""
        path = self._path(name)
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            make_folder(self.folder)
            with open(aside, "wb") as stream:
                _write(stream, arrays)
                sync(stream)
            os.replace(aside, path)
            sync_folder(self.folder)
        except OSError as error:
            self._complain(error)
        finally:
            with contextlib.suppress(
                OSError
            ):  # in a folder that cannot be written there is nothing to remove
                aside.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.index"

    def _complain(self, error: OSError) -> None:
        if not self.failed:
            logger.warning(
                "cache=%s cannot be written (%s): every process computes the document order for itself; "
                "set data.cache to a folder that can be written",
                self.folder,
                error.strerror,
            )
        self.failed = True


def make_folder(folder: Path) -> None:
    """mkdir that many processes call at once; on Lustre it has failed although the folder is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        if not folder.is_dir():
            raise


def _write(stream: IO[bytes], arrays: Arrays) -> None:
    pieces = _pieces(arrays)
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    stream.write(PREAMBLE.pack(MAGIC, sum(len(piece) for piece in pieces), checksum))
    for piece in pieces:
        stream.write(piece)


def _pieces(arrays: Arrays) -> list[memoryview]:
    """Header and arrays as bytes, each filled up to a multiple of ``ALIGN_BYTES``."""
    header, offset_bytes = {}, 0
    pieces = []
    for name, array in arrays.items():
        header[name] = (array.dtype.str, array.shape, offset_bytes)
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        pieces += [raw, memoryview(bytes(-len(raw) % ALIGN_BYTES))]
        offset_bytes += len(pieces[-2]) + len(pieces[-1])
    words = json.dumps(header).encode() + b"\n"
    words += b" " * (-(PREAMBLE.size + len(words)) % ALIGN_BYTES)
    return [memoryview(words), *pieces]


def _read(path: Path) -> Arrays:
    raw = np.memmap(path, mode="r", dtype=np.uint8).view(np.ndarray)
    if len(raw) < PREAMBLE.size:
        raise ValueError(f"{len(raw)} bytes are too few")
    magic, num_bytes, checksum = PREAMBLE.unpack(raw[: PREAMBLE.size].tobytes())
    body = raw[PREAMBLE.size :]
    if magic != MAGIC or len(body) != num_bytes:
        raise ValueError(f"{len(body)} bytes, {num_bytes} were written")
    if zlib.crc32(body.data) != checksum:
        raise ValueError("its checksum differs")
    words = body[:HEADER_LIMIT_BYTES].tobytes().partition(b"\n")[0] + b"\n"
    start = -(-(PREAMBLE.size + len(words)) // ALIGN_BYTES) * ALIGN_BYTES
    return {
        name: _array(raw[start + offset_bytes :], np.dtype(dtype), tuple(shape))
        for name, (dtype, shape, offset_bytes) in json.loads(words).items()
    }


def _array(raw: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return raw[: count * dtype.itemsize].view(dtype).reshape(shape)
