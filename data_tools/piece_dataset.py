"""A corpus as samples that never cross from one document into the next: each document cut into pieces.

Epoch e visits all pieces in a keyed permutation.  Short documents are short pieces; what is left of a document when
it was cut is a piece if it is worth one.
"""

import numpy as np

from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.gpt_dataset import ORDER_VERSION, Sample, first_beyond
from data_tools.index_cache import Arrays, IndexCache
from data_tools.permutation import Permutation, key_of

SHORTEST = 8  # tokens of a piece


class PieceDataset:
    """The documents ``first`` to ``last`` (excluded) of a corpus, in pieces of at most ``sequence_length`` tokens."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence_length: int,
        seed: int,
        first: int,
        last: int,
        cache: IndexCache,
        end_of_document: int,
        vocab_size: int | None = None,
    ):
        """``vocab_size``: ids that the corpus may hold; None: any."""
        self.vocab_size = vocab_size
        self.corpus, self.first, self.last = corpus, first, last
        self.sequence_length, self.seed = sequence_length, seed
        self._cache, self._end_of_document = cache, end_of_document
        lengths = corpus.index.document_lengths()[first:last]
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        self.samples_per_epoch = int(self._counts(lengths).sum(dtype=np.int64))
        self._ends: np.ndarray | None = None
        self._orders: dict[int, Permutation] = {}

    def check(self) -> None:
        if self.samples_per_epoch < 2:
            raise DataError(
                f"corpus={self.corpus.prefix}: {self.last - self.first} documents hold {self.samples_per_epoch} pieces "
                f"of {SHORTEST} tokens or more, and a pair of texts needs two: give more text, or weight 0"
            )

    def sample(self, number: int) -> Sample:
        """Piece ``number`` of all epochs; without the token that ends its document."""
        epoch, place = divmod(number, self.samples_per_epoch)
        if epoch not in self._orders:
            self._orders = {old: order for old, order in self._orders.items() if abs(old - epoch) <= 1}
            key = key_of(ORDER_VERSION, self.seed, self.corpus.fingerprint, epoch, "pieces")
            self._orders[epoch] = Permutation(self.samples_per_epoch, key=key)
        return self.piece(self._orders[epoch][place])

    def piece(self, number: int) -> Sample:
        """Piece ``number`` in the order of the corpus."""
        ends = self._piece_ends()
        document = int(np.searchsorted(ends, number, side="right"))
        within = number - (int(ends[document - 1]) if document else 0)
        index, which = self.corpus.index, self.first + document
        begin = index.document_start(which) + within * self.sequence_length
        end = index.document_start(which) + int(index.document_lengths()[which])
        tokens = np.array(index.tokens[begin : min(end, begin + self.sequence_length)], dtype=np.int64)
        offset = first_beyond(tokens, self.vocab_size)
        if offset is not None:
            assert self.vocab_size is not None
            raise DataError(self.corpus.beyond_vocabulary(begin + offset, self.vocab_size))
        if len(tokens) and tokens[-1] == self._end_of_document:
            tokens = tokens[:-1]
        return Sample(tokens, np.zeros(0 if within else 1, dtype=np.int64))

    def cache_name(self, epoch: int) -> str:
        return (
            f"{key_of('pieces', self.corpus.fingerprint, self.first, self.last, self.sequence_length):016x}"
        )

    def document_order(self, epoch: int) -> Arrays:
        """Where each document's pieces end; the same in every epoch."""
        return self._cache.get(self.cache_name(epoch), self._build)

    @property
    def facts(self) -> tuple[str | int, ...]:
        return (
            ORDER_VERSION,
            "pieces",
            self.corpus.fingerprint,
            self.first,
            self.last,
            self.sequence_length,
            self.seed,
        )

    def _counts(self, lengths: np.ndarray) -> np.ndarray:
        return (
            np.maximum(0, (lengths.astype(np.int64) - 1 + self.sequence_length - SHORTEST))
            // self.sequence_length
        )

    def _build(self) -> Arrays:
        lengths = self.corpus.index.document_lengths()[self.first : self.last]
        return {"ends": np.cumsum(self._counts(lengths), dtype=np.int64)}

    def _piece_ends(self) -> np.ndarray:
        if self._ends is None:
            self._ends = self.document_order(0)["ends"]
        return self._ends
