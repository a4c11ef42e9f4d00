import os
from pathlib import Path

import numpy as np
import pytest

from data_tools.documents import Block
from data_tools.errors import DataError
from data_tools.tokenise import EncoderSpec, Task, encode_tasks

SPEC = EncoderSpec("bytes", "text", append_end=True, dtype="uint16")


def task(*texts: str) -> Task:
    return tuple(Block("in", 1, "text", text.encode(), len(text)) for text in texts)


@pytest.mark.parametrize("workers", [0, 2])
def test_chunks_come_in_the_order_of_their_tasks(workers: int) -> None:
    texts = [str(number) * (1 + 5000 * (number % 3 == 0)) for number in range(20)]
    chunks = list(encode_tasks((task(text, "") for text in texts), SPEC, num_workers=workers))
    assert [bytes(chunk.tokens[:-1].astype(np.uint8)).decode() for chunk in chunks] == texts
    assert all(chunk.tokens[-1] == 256 and chunk.lengths.tolist() == [len(chunk.tokens)] for chunk in chunks)
    assert (
        [chunk.text_bytes for chunk in chunks]
        == [chunk.bytes_read for chunk in chunks]
        == list(map(len, texts))
    )
    assert all(chunk.skips.by_reason() == {"empty": 1} for chunk in chunks)


def test_tasks_are_read_as_they_are_needed() -> None:
    """A corpus larger than memory must not be read ahead of the workers."""
    read: list[int] = []

    def tasks():  # type: ignore[no-untyped-def]
        for number in range(50):
            read.append(number)
            yield task("a")

    chunks = encode_tasks(tasks(), SPEC, num_workers=1)
    next(chunks)
    assert len(read) < 10
    chunks.close()


def test_a_dead_worker_is_told_with_the_way_out() -> None:
    with pytest.raises(DataError, match="workers=1: a worker process died, most often for lack of memory"):
        list(encode_tasks(iter([(_Deadly(),)]), SPEC, num_workers=1))  # type: ignore[list-item]


def test_workers_leave_the_librarys_threads_alone(tmp_path: Path) -> None:
    (chunk,) = encode_tasks(iter([(_Environment(),)]), SPEC, num_workers=1)  # type: ignore[list-item]
    assert bytes(chunk.tokens[:-1].astype(np.uint8)) == b"false"


class _Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (1,)


class _Environment:
    """Becomes, where it is unpickled, a block whose text is a variable of that process's environment."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _block_of_variable, ("TOKENIZERS_PARALLELISM",)


def _block_of_variable(name: str) -> Block:
    return Block("in", 1, "text", os.environ[name].encode(), 0)
