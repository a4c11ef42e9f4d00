"""Ways to damage a small corpus's files, each in place and without changing their sizes unless it says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_tools.indexed import HEADER, IndexedReader

Damage = Callable[[Path], None]


def patch(path: Path, place: int, data: bytes) -> None:
    """Overwrite bytes from ``place`` on, counted from the end if negative."""
    whole = path.read_bytes()
    place = place % len(whole)
    path.write_bytes(whole[:place] + data + whole[place + len(data) :])


def edit_index(change: Callable[[np.ndarray, np.ndarray, np.ndarray], None]) -> Damage:
    """``change`` edits lengths, pointers and documents in place."""

    def damage(prefix: Path) -> None:
        reader = IndexedReader(prefix)
        parts = [
            array.copy()
            for array in (reader.sequence_lengths, reader.sequence_pointers, reader.document_indices)
        ]
        change(*parts)
        patch(Path(f"{prefix}.idx"), HEADER.size, b"".join(part.tobytes() for part in parts))

    return damage


def set_document(number: int, value: int) -> Damage:
    return edit_index(lambda lengths, pointers, documents: documents.__setitem__(number, value))


def set_length(number: int, value: int) -> Damage:
    return edit_index(lambda lengths, pointers, documents: lengths.__setitem__(number, value))


def set_pointer(number: int, value: int) -> Damage:
    return edit_index(lambda lengths, pointers, documents: pointers.__setitem__(number, value))


def swap_documents(lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray) -> None:
    documents[[2, 3]] = documents[[3, 2]]


def cover_half(lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray) -> None:
    documents[:] = np.minimum(documents, len(lengths) // 2)


def move_a_token(lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray) -> None:
    """Their sum is kept."""
    lengths[1] += 1
    lengths[2] -= 1


def move_a_boundary(lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray) -> None:
    """Consistent with itself and with the size of the data: only a hash shows it."""
    move_a_token(lengths, pointers, documents)
    pointers[2] += 2


def exchange_bin(prefix: Path) -> None:
    """For one of the same size."""
    path = Path(f"{prefix}.bin")
    path.write_bytes(np.roll(np.frombuffer(path.read_bytes(), np.uint16), 7).tobytes())


def exchange_block(block_bytes: int, number: int) -> Damage:
    """For the one before it."""

    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.bin")
        whole = path.read_bytes()
        patch(path, number * block_bytes, whole[(number - 1) * block_bytes : number * block_bytes])

    return damage


def flip_a_bit(at: int) -> Damage:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.bin")
        patch(path, at, bytes([path.read_bytes()[at] ^ 1]))

    return damage


def append_to_bin(data: bytes) -> Damage:
    def damage(prefix: Path) -> None:
        with open(f"{prefix}.bin", "ab") as stream:
            stream.write(data)

    return damage


def to_format_1(prefix: Path) -> None:
    """As `megaloom prepare` wrote manifests before it hashed blocks."""
    path = Path(f"{prefix}.json")
    facts = json.loads(path.read_text())
    path.write_text(
        json.dumps({**{key: facts[key] for key in facts if key != "blocks"}, "format": 1}, indent=2)
    )


def without_manifest(prefix: Path) -> None:
    Path(f"{prefix}.json").unlink()
    shutil.rmtree(f"{prefix}.tokenizer")
