"""A corpus as an endless sequence of samples of s + 1 tokens, in an order that nothing but the facts decide.

Epoch e lays the documents end to end in the order of their hash under (seed, corpus, e), cuts the tokens
into samples of stride s (sample i holds tokens i*s to i*s + s, so that each token is a label once), and
visits the samples in a keyed permutation.  The few tokens that do not fill a last sample wait for the next
epoch's order.

Why not megatron.core's GPTDataset: its order depends on how many samples a run asks for, so that prolonging
a run reshuffles what it has already seen, and building its index needs torch.distributed.  Here sample i is
the same for every length of run, number of ranks, and version of the libraries.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.index_cache import Arrays, IndexCache
from data_tools.permutation import Permutation, key_of, scattered

ORDER_VERSION = 1  # part of every cache name and fingerprint: raise it if the order ever changes


@dataclass(frozen=True)
class Sample:
    """One sample and where in it documents begin."""

    tokens: np.ndarray  # int64 [s + 1]
    starts: np.ndarray  # int64 [documents that begin here], places 0..s


def first_beyond(tokens: np.ndarray, vocab_size: int | None) -> int | None:
    """Where in an int64 array the first id lies that a vocabulary does not have."""
    # Read without their sign, negative ids are large ones: one pass over the array, without a copy.
    ids = tokens.reshape(-1).view(np.uint64)
    if vocab_size is None or not ids.size or ids.max() < vocab_size:
        return None
    return int((ids >= vocab_size).argmax())


@dataclass(frozen=True)
class _Epoch:
    """The order of one pass over the documents."""

    documents: np.ndarray  # [documents] which document comes at each place
    ends: np.ndarray  # int64 [documents] tokens up to and including it
    samples: Permutation


class GPTDataset:
    """The documents ``first`` to ``last`` (excluded) of a corpus as samples."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence_length: int,
        seed: int,
        first: int,
        last: int,
        cache: IndexCache,
        vocab_size: int | None = None,
    ):
        """``vocab_size``: ids that the corpus may hold; None: any."""
        self.corpus, self.first, self.last = corpus, first, last
        self.vocab_size = vocab_size
        self.sequence_length, self.seed = sequence_length, seed
        self._cache = cache
        self._epochs: dict[int, _Epoch] = {}
        lengths = corpus.index.document_lengths()[first:last]
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        self.samples_per_epoch = max(0, (self.num_tokens - 1) // sequence_length)

    def check(self) -> None:
        """Refuse a part that does not fill one sample."""
        if self.samples_per_epoch:
            return
        needed = self.sequence_length + 1
        raise DataError(
            f"corpus={self.corpus.prefix}: {self.last - self.first} documents hold {self.num_tokens} tokens, "
            f"one sample of sequence_length={self.sequence_length} needs {needed}: give more text, "
            f"a shorter sequence_length, or weight 0"
        )

    def sample(self, number: int) -> Sample:
        """Sample ``number`` of all epochs.

        Raises:
            DataError: it holds an id beyond the vocabulary.
        """
        sample = self.read(number)
        offset = first_beyond(sample.tokens, self.vocab_size)
        if offset is not None:
            raise DataError(self.beyond_vocabulary(number, offset))
        return sample

    def read(self, number: int) -> Sample:
        """The same, with whatever ids it holds."""
        return self._gather(*self._place(number))

    def beyond_vocabulary(self, number: int, offset: int) -> str:
        """The sentence about the id at ``offset`` of sample ``number``."""
        assert self.vocab_size is not None
        epoch, start = self._place(number)
        place = int(np.searchsorted(epoch.ends, start + offset, side="right"))
        before = int(epoch.ends[place - 1]) if place else 0
        at = self.corpus.index.document_start(int(epoch.documents[place])) + start + offset - before
        return self.corpus.beyond_vocabulary(at, self.vocab_size)

    def cache_name(self, epoch: int) -> str:
        """The cache's name for the document order of an epoch."""
        # The order does not depend on the sequence length, so runs that differ in it share a file.
        return f"{key_of(self._key(epoch, 'documents'), self.first, self.last):016x}-{epoch}"

    def document_order(self, epoch: int) -> Arrays:
        """The order of an epoch's documents, from the cache or built into it."""
        return self._cache.get(self.cache_name(epoch), lambda: self._build(epoch))

    def _place(self, number: int) -> tuple[_Epoch, int]:
        """The epoch of a sample, and the token of that epoch with which it begins."""
        number_of_epoch, place = divmod(number, self.samples_per_epoch)
        epoch = self._epoch(number_of_epoch)
        return epoch, epoch.samples[place] * self.sequence_length

    def _epoch(self, number: int) -> _Epoch:
        """The last two epochs stay open: samples of a blend can fall on either side."""
        found = self._epochs.get(number)
        if found is None:
            arrays = self.document_order(number)
            samples = Permutation(self.samples_per_epoch, key=self._key(number, "samples"))
            found = _Epoch(arrays["documents"], arrays["ends"], samples)
            self._epochs = {old: kept for old, kept in self._epochs.items() if abs(old - number) <= 1}
            self._epochs[number] = found
        return found

    @cached_property
    def facts(self) -> tuple[str | int, ...]:
        """Everything that determines the order of the samples."""
        return (
            ORDER_VERSION,
            self.corpus.fingerprint,
            self.first,
            self.last,
            self.sequence_length,
            self.seed,
        )

    def _key(self, epoch: int, what: str) -> int:
        return key_of(ORDER_VERSION, self.seed, self.corpus.fingerprint, epoch, what)

    def _build(self, epoch: int) -> Arrays:
        lengths = self.corpus.index.document_lengths()[self.first : self.last]
        order = scattered(len(lengths), key=self._key(epoch, "documents"))
        ends = np.cumsum(lengths[order], dtype=np.int64)
        order += self.first
        fits = np.int32 if self.last <= np.iinfo(np.int32).max else np.int64
        return {"documents": order.astype(fits), "ends": ends}

    def _gather(self, epoch: _Epoch, start: int) -> Sample:
        """The s + 1 tokens from ``start`` on of the documents laid end to end."""
        needed = self.sequence_length + 1
        tokens = np.empty(needed, dtype=np.int64)
        starts: list[int] = []
        index, filled = self.corpus.index, 0
        place = int(
            np.searchsorted(epoch.ends, start, side="right")
        )  # the first document that ends after start
        begin = int(epoch.ends[place - 1]) if place else 0
        while filled < needed:
            end = int(epoch.ends[place])
            skip = start + filled - begin
            count = min(end - begin - skip, needed - filled)
            if count:
                if not skip:
                    starts.append(filled)
                at = index.document_start(int(epoch.documents[place])) + skip
                tokens[filled : filled + count] = index.tokens[at : at + count]
            filled += count
            place, begin = place + 1, end
        return Sample(tokens, np.array(starts, dtype=np.int64))
