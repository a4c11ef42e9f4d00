"""Blocks of text to blocks of tokens, by worker processes, in the order of the input.

The unit of work is cut without regard to the number of workers and results are taken in order, so one worker
and sixty write the same bytes.  Workers are spawned, ignore Ctrl-C (the parent decides), and end when the
parent is gone, even when it was killed.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from data_tools.documents import NO_TOKENS, Block, Skip, Skips, read_documents
from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer, load_tokenizer

Task = tuple[Block, ...]
TASKS_PER_WORKER = 3  # enough waiting that a worker never idles; bounds what is in memory


@dataclass
class TokenChunk:
    """The documents of one task, one after another."""

    tokens: np.ndarray  # [tokens], in the corpus's type
    lengths: np.ndarray  # [documents], end-of-document tokens included
    text_bytes: int
    bytes_read: int
    skips: Skips


@dataclass(frozen=True)
class Encoder:
    """What turns a task into tokens: the same in every process."""

    tokenizer: Tokenizer
    text_field: str
    append_end: bool
    dtype: np.dtype

    def __call__(self, task: Task) -> TokenChunk:
        found = read_documents(task, text_field=self.text_field)
        end = [self.tokenizer.end_of_document] if self.append_end else []
        ends = np.array(end, dtype=self.dtype)
        pieces, lengths = [], []
        for ids, (source, line) in zip(self.tokenizer.encode_batch(found.texts), found.places, strict=True):
            if not len(ids):
                found.skips.add(Skip(NO_TOKENS, source, line))
                continue
            pieces += [ids, ends]
            lengths.append(len(ids) + len(ends))
        tokens = (
            np.concatenate(pieces, dtype=self.dtype, casting="unsafe") if pieces else np.empty(0, self.dtype)
        )
        bytes_read = sum(block.bytes_read for block in task)
        return TokenChunk(tokens, np.array(lengths, np.int64), found.text_bytes, bytes_read, found.skips)


@dataclass(frozen=True)
class EncoderSpec:
    """How a worker builds its `Encoder`: plain words, since tokenizers do not travel between processes."""

    tokenizer: str  # a folder that the parent saved, so that all workers have the parent's own
    text_field: str
    append_end: bool
    dtype: str

    def build(self) -> Encoder:
        return Encoder(load_tokenizer(self.tokenizer), self.text_field, self.append_end, np.dtype(self.dtype))


def encode_tasks(
    tasks: Iterator[Task], spec: EncoderSpec, *, num_workers: int
) -> Generator[TokenChunk, None, None]:
    """Encode every task, in order; 0 workers means this process and the tokenizer library's own threads."""
    if num_workers == 0:
        yield from map(spec.build(), tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    try:
        yield from _in_order(pool, tasks, spec, limit=num_workers * TASKS_PER_WORKER)
    except BrokenProcessPool:
        raise DataError(
            f"workers={num_workers}: a worker process died, most often for lack of memory: "
            f"try fewer --workers, or split very large documents"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, tasks: Iterator[Task], spec: EncoderSpec, *, limit: int
) -> Iterator[TokenChunk]:
    waiting: deque[Future[TokenChunk]] = deque()
    for task in tasks:
        if len(waiting) == limit:
            yield waiting.popleft().result()
        waiting.append(_with_interrupt_blocked(pool.submit, _encode, spec, task))
    while waiting:
        yield waiting.popleft().result()


def _with_interrupt_blocked(function: Callable[..., Any], *args: Any) -> Any:
    """Processes that start here inherit the blocked signal: no worker prints a traceback at Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return function(*args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process per core: the library's own threads would fight the other workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


@cache
def _encoder(spec: EncoderSpec) -> Encoder:
    return spec.build()


def _encode(spec: EncoderSpec, task: Task) -> TokenChunk:
    return _encoder(spec)(task)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
