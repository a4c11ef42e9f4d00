"""`open_data`: from a data configuration to sample sources, with every mistake told before training starts.

Every rank calls it.  One process writes the document orders into the cache while the others wait, then all
map the same files; see `ranks.Ranks` for what it must know of the others.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_tools.blended_dataset import BlendedDataset
from data_tools.config import SPLIT_PARTS, CorpusRef, DataConfig, parse_split
from data_tools.corpus import Corpus, shared_vocab_size
from data_tools.errors import DataError
from data_tools.gpt_dataset import GPTDataset
from data_tools.index_cache import IndexCache
from data_tools.loader import SampleSource
from data_tools.ranks import ALONE, Ranks, is_builder
from data_tools.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

CACHE_NAME = ".index-cache"
# How long a rank waits for a file that the builder has written: NFS denies new files for up to its attribute
# cache's maximum, 60 s by default (nfs(5), acdirmax); after that the rank computes the order itself.
PATIENCE_S = 70.0
# A toy corpus under a long run has thousands of epochs: later ones are computed when they are reached.
MAX_EPOCHS_AHEAD = 16
TRAIN, VALID, TEST = SPLIT_PARTS


@dataclass(frozen=True)
class TrainingData:
    """Everything that a run reads."""

    config: DataConfig
    train: SampleSource
    validation: dict[str, SampleSource]
    test: dict[str, SampleSource]
    vocab_size: int
    corpora: tuple[Corpus, ...]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the corpora, loaded when first asked for."""
        if self.config.tokenizer is not None:
            return load_tokenizer(self.config.tokenizer)
        return self.corpora[0].tokenizer()

    def fingerprint(self) -> str:
        """A hash of everything that determines the order of training samples; to be compared at resume."""
        return self.train.dataset.fingerprint()

    def next_samples_hash(self, consumed_samples: int, *, num_samples: int) -> str:
        """A hash of the next samples' tokens: the same at any data-parallel size and micro-batch size."""
        return self.train.dataset.samples_hash(consumed_samples, num_samples)


def open_data(config: DataConfig, *, num_train_samples: int = 0, ranks: Ranks = ALONE) -> TrainingData:
    """Open all corpora of a run.  Collective: every rank of ``ranks`` calls it.

    Args:
        num_train_samples: how many samples the run is going to take, so that the orders of all its epochs are
            ready; it changes no order, and later epochs are computed when they are reached.
    """
    opened = fault = None
    try:
        opened = _Opening(config)
    except DataError as error:
        fault = error
    everyone = ranks.all_true(fault is None)
    if fault is not None:
        raise fault
    if not everyone or opened is None:
        raise DataError("another rank could not open its data: see its message; is the folder on every node?")
    opened.build_orders(num_train_samples, ranks=ranks)
    return opened.data()


class _Opening:
    """The work of `open_data`, in the order in which mistakes are best told."""

    def __init__(self, config: DataConfig):
        self._config = config
        self._corpora = _corpora(config)
        self._vocab_size = shared_vocab_size(list(self._corpora.values()), tokenizer=config.tokenizer)
        self._cache = IndexCache(config.cache or _cache_beside(config))
        train = self._part_of_split(TRAIN)
        assert train is not None, "the first share of a split is positive"
        self._train = train
        self._validation = self._sets(VALID, config.validation)
        self._test = self._sets(TEST, config.test)

    def build_orders(self, num_train_samples: int, *, ranks: Ranks) -> None:
        """Let the builder write the document orders; collective."""
        started_s = time.monotonic()
        builder = is_builder(self._cache.folder, scope=self._config.cache_scope, ranks=ranks)
        wanted = self._orders_wanted(num_train_samples)
        built = not builder
        try:
            if builder:
                for dataset, epoch in wanted:
                    dataset.document_order(epoch)
                built = not self._cache.failed
        finally:  # a builder that fails must not leave the others waiting
            written = ranks.all_true(built)
        if written and not builder:
            for dataset, epoch in wanted:
                self._cache.promise(dataset.cache_name(epoch), patience_s=PATIENCE_S)
        logger.info("%d document orders ready after %.1f s", len(wanted), time.monotonic() - started_s)

    def data(self) -> TrainingData:
        return TrainingData(
            config=self._config,
            train=self._train,
            validation=self._validation,
            test=self._test,
            vocab_size=self._vocab_size,
            corpora=tuple(self._corpora.values()),
        )

    def _orders_wanted(self, num_train_samples: int) -> list[tuple[GPTDataset, int]]:
        epochs = self._train.dataset.num_epochs(max(1, num_train_samples))
        wanted = [
            (dataset, epoch)
            for dataset, count in zip(self._train.dataset.datasets, epochs, strict=True)
            for epoch in range(min(count, MAX_EPOCHS_AHEAD))
        ]
        for source in (*self._validation.values(), *self._test.values()):
            wanted += [(dataset, 0) for dataset in source.dataset.datasets]
        return wanted

    def _sets(self, part: str, named: dict[str, tuple[CorpusRef, ...]]) -> dict[str, SampleSource]:
        """The part of the split under its own name, then the named sets."""
        of_split = self._part_of_split(part)
        sets = {} if of_split is None else {part: of_split}
        for name, refs in named.items():
            sets[name] = self._source(name, refs, bounds=(0.0, 1.0))
        return sets

    def _part_of_split(self, part: str) -> SampleSource | None:
        shares = parse_split(self._config.split)
        number = SPLIT_PARTS.index(part)
        if not shares[number]:
            return None
        bounds = (sum(shares[:number]), sum(shares[: number + 1]))
        if part == TRAIN:
            return self._source(part, self._config.train, bounds=bounds)
        return self._source(part, self._config.train, bounds=bounds, of_split=self._config.split)

    def _source(
        self,
        name: str,
        refs: Sequence[CorpusRef],
        *,
        bounds: tuple[float, float],
        of_split: str | None = None,
    ) -> SampleSource:
        used = [ref for ref in refs if ref.weight]
        datasets = [self._dataset(ref, bounds) for ref in used]
        if of_split is None:
            for dataset in datasets:
                dataset.check()
        else:
            used, datasets = _with_samples(name, used, datasets, split=of_split)
        return SampleSource(
            name,
            BlendedDataset(datasets, [ref.weight for ref in used]),
            reset_at_documents=self._config.documents == "reset",
            mask_boundary_loss=self._config.mask_boundary_loss,
        )

    def _dataset(self, ref: CorpusRef, bounds: tuple[float, float]) -> GPTDataset:
        corpus = self._corpora[ref.path]
        # Rounded as in megatron/core/datasets/blended_megatron_dataset_builder.py, so that both hold out
        # the same documents.
        first, last = (round(bound * corpus.index.num_documents) for bound in bounds)
        return GPTDataset(
            corpus,
            sequence_length=self._config.sequence_length,
            seed=self._config.seed,
            first=first,
            last=last,
            cache=self._cache,
        )


def _corpora(config: DataConfig) -> dict[str, Corpus]:
    """Each corpus once, however many sets name it; one of weight 0 is not looked for."""
    groups = (config.train, *config.validation.values(), *config.test.values())
    paths = dict.fromkeys(ref.path for refs in groups for ref in refs if ref.weight)
    return {path: Corpus(path) for path in paths}


def _with_samples(
    name: str, refs: list[CorpusRef], datasets: list[GPTDataset], *, split: str
) -> tuple[list[CorpusRef], list[GPTDataset]]:
    """A held-out part may be too small in some corpora, which are then left out of it, but not in all."""
    kept = [(ref, dataset) for ref, dataset in zip(refs, datasets, strict=True) if dataset.samples_per_epoch]
    if not kept:
        num_documents = sum(dataset.last - dataset.first for dataset in datasets)
        num_tokens = sum(dataset.num_tokens for dataset in datasets)
        length = datasets[0].sequence_length
        raise DataError(
            f"split={split} leaves {num_documents} documents with {num_tokens} tokens for {name!r}, one "
            f"sample of sequence_length={length} needs {length + 1}: give that part a larger share, or 0 "
            f"and name a corpus for it"
        )
    if len(kept) < len(refs):
        short = ", ".join(sorted({ref.path for ref in refs} - {ref.path for ref, _ in kept}))
        logger.warning("%s: too little text in the part that split=%s gives it of %s", name, split, short)
    return [ref for ref, _ in kept], [dataset for _, dataset in kept]


def _cache_beside(config: DataConfig) -> Path:
    first = next(ref for ref in config.train if ref.weight)
    return Path(first.path).expanduser().parent / CACHE_NAME
