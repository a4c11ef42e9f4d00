"""What a run reads of its corpora before it trusts them (``data.verify``): the index always, the data in part or whole.

    sampled   `BLOCKS_AT_START` blocks of .bin at the start, the rest while the run trains (`background_check`)
    full      all of .bin before the start
    off       no hashes

Corpora without a manifest have no hashes; of theirs the ids in such blocks are compared with the vocabulary.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from data_tools.block_hashes import BLOCK_BYTES
from data_tools.corpus import Corpus
from data_tools.corpus_check import (
    bin_faults,
    check_whole,
    ids_fault,
    index_hash_fault,
    num_blocks,
    readable,
    sample_of_blocks,
)
from data_tools.errors import DataError
from data_tools.verified import Verified

logger = logging.getLogger(__name__)

Verify = Literal["sampled", "full", "off"]
BLOCKS_AT_START = 32  # of each corpus: 128 MiB, a tenth of a second from memory
BLOCKS_OF_ALL = 256  # of a blend's corpora together, but two of each at least
WHOLE_AT_START_BYTES = (
    1 << 30
)  # format 1: a .bin up to this size is read before the start, a larger one beside the run
SECONDS_BETWEEN_LINES = 30.0


class DataCheck:
    """The checks of one process over all corpora of a run."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        verify: Verify,
        seed: int,
        vocab_size: int,
        verified: Verified | None = None,
    ):
        """``vocab_size``: ids of the tokenizer."""
        self._corpora, self._verify, self._seed, self._vocab_size = corpora, verify, seed, vocab_size
        self._verified = verified or Verified()
        self._most = max(2, min(BLOCKS_AT_START, BLOCKS_OF_ALL // max(1, len(corpora))))
        self._is_whole: set[str] = set()  # corpora of which nothing is left to read

    def at_start(self) -> None:
        """Indices, and of the data what ``sampled`` reads.

        Raises:
            DataError: the first fault.
        """
        for corpus in self._corpora:
            corpus.check()
            if self._verify == "off":
                self._is_whole.add(corpus.prefix)
                continue
            with readable(corpus):
                self._check(corpus)

    def whole(self) -> Iterator[None]:
        """Read what `at_start` left of all .bin; each item is a block. Raises as `at_start` does."""
        for corpus in self.rest():
            started_s, key = time.monotonic(), self._verified.key(corpus)
            with readable(corpus):
                yield from self._with_account(corpus)
            self._is_whole.add(corpus.prefix)
            self._verified.remember(key)
            logger.info("verified %s in %.1f s", corpus.prefix, time.monotonic() - started_s)

    def rest(self) -> list[Corpus]:
        """Corpora whose .bin was not read whole."""
        return [corpus for corpus in self._corpora if corpus.prefix not in self._is_whole]

    def _with_account(self, corpus: Corpus) -> Iterator[None]:
        """The blocks, with a line on how many there were now and then."""
        told_s, total_bytes = time.monotonic(), corpus.index.data_bytes
        for count, _ in enumerate(check_whole(corpus), start=1):
            if time.monotonic() - told_s > SECONDS_BETWEEN_LINES:
                told_s, read_bytes = time.monotonic(), min(count * BLOCK_BYTES, total_bytes)
                logger.info(
                    "verified %.1f of %.1f GB of %s", read_bytes / 1e9, total_bytes / 1e9, corpus.prefix
                )
            yield None

    def _check(self, corpus: Corpus) -> None:
        manifest = corpus.manifest
        if manifest is None:
            self._is_whole.add(corpus.prefix)
            self._refuse(ids_fault(corpus, self._vocab_size, self._sample(corpus, BLOCK_BYTES)))
        elif manifest.blocks is not None:
            self._refuse(index_hash_fault(corpus))
            numbers = self._sample(corpus, manifest.blocks.block_bytes)
            for fault in bin_faults(corpus, numbers):
                self._refuse(fault)
            if len(numbers) == num_blocks(corpus.index.data_bytes, manifest.blocks.block_bytes) or (
                self._verify == "sampled" and corpus in self._verified
            ):
                self._is_whole.add(corpus.prefix)
        elif self._verify == "sampled" and corpus in self._verified:
            self._is_whole.add(corpus.prefix)
        else:
            self._check_format_1(corpus)

    def _check_format_1(self, corpus: Corpus) -> None:
        key = self._verified.key(corpus)
        self._refuse(index_hash_fault(corpus))
        if corpus.index.data_bytes > WHOLE_AT_START_BYTES:
            return
        for _ in check_whole(corpus):
            pass
        self._is_whole.add(corpus.prefix)
        self._verified.remember(key)

    def _sample(self, corpus: Corpus, block_bytes: int) -> list[int]:
        return sample_of_blocks(num_blocks(corpus.index.data_bytes, block_bytes), self._most, seed=self._seed)

    def _refuse(self, fault: str | None) -> None:
        if fault is not None:
            raise DataError(fault)
