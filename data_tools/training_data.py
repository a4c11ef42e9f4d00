"""`open_data`: from a data configuration to sample sources, with every mistake told before training starts.

Every rank calls it.  One process writes the document orders into the cache while the others wait, then all map
the same files; see `ranks.Ranks` for what it must know of the others.
"""

import hashlib
import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from data_tools.blended_dataset import Dataset
from data_tools.config import DataConfig
from data_tools.corpus import Corpus, shared_vocab_size
from data_tools.data_check import DataCheck
from data_tools.errors import DataError
from data_tools.index_cache import IndexCache
from data_tools.loader import SampleSource
from data_tools.ranks import ALONE, Ranks, is_builder, together
from data_tools.sample_sources import TEST, VALID, SourceMaker
from data_tools.special_tokens import special_tokens
from data_tools.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

CACHE_NAME = ".index-cache"
# How long a rank waits for a file that the builder has written: NFS denies new files for up to its attribute
# cache's maximum, 60 s by default (nfs(5), acdirmax); after that the rank computes the order itself.
PATIENCE_S = 70.0
# A toy corpus under a long run has thousands of epochs: later ones are computed when they are reached.
MAX_EPOCHS_AHEAD = 16
SECONDS_BETWEEN_VOTES = 5.0


@dataclass(frozen=True)
class TrainingData:
    """Everything that a run reads."""

    config: DataConfig
    train: SampleSource
    validation: dict[str, SampleSource]
    test: dict[str, SampleSource]
    vocab_size: int  # as the tokenizer has it, not padded
    corpora: tuple[Corpus, ...]
    unverified: tuple[Corpus, ...] = ()  # whose data this rank is to verify while the run trains

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the corpora, loaded when first asked for."""
        if self.config.tokenizer is not None:
            return load_tokenizer(self.config.tokenizer)
        return self.corpora[0].tokenizer()

    def fingerprint(self) -> str:
        """A hash of everything that determines the order of training samples; to be compared at resume."""
        order, objective = self.train.dataset.fingerprint(), self.config.objective
        if objective is None:
            return order
        return hashlib.sha256(f"{order} {objective.model_dump_json()}".encode()).hexdigest()

    def next_samples_hash(self, consumed_samples: int, *, num_samples: int) -> str:
        """A hash of the next samples' tokens: the same at any data-parallel size and micro-batch size."""
        return self.train.dataset.samples_hash(consumed_samples, num_samples)


def open_data(config: DataConfig, *, num_train_samples: int = 0, ranks: Ranks = ALONE) -> TrainingData:
    """Open all corpora of a run.  Collective: every rank of ``ranks`` calls it.

    Args:
        num_train_samples: how many samples the run is going to take, so that the orders of all its epochs are
            ready; it changes no order, and later epochs are computed when they are reached.
    """
    cache = IndexCache(config.cache or _cache_beside(config))
    opened = together(ranks, lambda: _open_corpora(config, is_checker=ranks.is_first_on_node))
    if config.verify == "full":
        _verify_whole(opened.check, ranks)
    data = together(ranks, lambda: _make_sources(config, opened, cache))
    _build_orders(data, cache, num_train_samples=num_train_samples, ranks=ranks)
    return data


def check_data(config: DataConfig) -> TrainingData:
    """Open everything and build nothing: each corpus whole, each set long enough, one tokenizer for all.

    Raises:
        DataError: what is wrong, in the words with which `open_data` would refuse it.
    """
    opened = _open_corpora(config, is_checker=True)
    data = _make_sources(config, opened, IndexCache(config.cache or _cache_beside(config)))
    first = data.corpora[0]
    if config.tokenizer is None and (fault := first.tokenizer_fault()) is not None:
        raise DataError(f"corpus={first.prefix}: {fault}; copy it again, or prepare the corpus again")
    return data


class _Opened(NamedTuple):
    corpora: dict[str, Corpus]  # by the path that the run gives
    text_size: int  # ids of the tokenizer
    check: DataCheck | None  # None: another rank of this node has done it


def _open_corpora(config: DataConfig, *, is_checker: bool) -> _Opened:
    """Each corpus once, however many sets name it; one of weight 0 is not looked for."""
    corpora = {path: Corpus(path, check=False) for path in config.prefixes()}
    size = shared_vocab_size(list(corpora.values()), tokenizer=config.tokenizer)
    if not is_checker:
        return _Opened(corpora, size, None)
    check = DataCheck(list(corpora.values()), verify=config.verify, seed=config.seed, vocab_size=size)
    check.at_start()
    return _Opened(corpora, size, check)


def _verify_whole(check: DataCheck | None, ranks: Ranks) -> None:
    """All of .bin, by the first rank of each node; the others vote every few seconds, so that none times out."""
    blocks = iter(()) if check is None else check.whole()
    done = 0

    def read_some() -> bool:
        nonlocal done
        until_s = time.monotonic() + SECONDS_BETWEEN_VOTES
        for _ in blocks:
            done += 1
            if time.monotonic() > until_s:
                return False
        return True

    is_done = False
    while not ranks.all_true(is_done):
        ranks.doing(f"{done} blocks")
        is_done = together(ranks, read_some)


def _make_sources(config: DataConfig, opened: _Opened, cache: IndexCache) -> TrainingData:
    corpora, vocab_size = opened.corpora, opened.text_size
    tokenizer = None
    if config.objective is not None:
        first = next(iter(corpora.values()))
        tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else first.tokenizer()
        vocab_size = special_tokens(tokenizer, config.objective).vocab_size
    make = SourceMaker(config, corpora, cache=cache, text_size=opened.text_size, tokenizer=tokenizer)
    return TrainingData(
        config=config,
        vocab_size=vocab_size,
        train=make.train(),
        validation=make.held_out(VALID, config.validation),
        test=make.held_out(TEST, config.test),
        corpora=tuple(corpora.values()),
        unverified=tuple(opened.check.rest()) if opened.check is not None else (),
    )


def _build_orders(data: TrainingData, cache: IndexCache, *, num_train_samples: int, ranks: Ranks) -> None:
    """Let the builder write the document orders, and the others know that they are there; collective."""
    started_s = time.monotonic()
    builder = is_builder(cache.folder, scope=data.config.cache_scope, ranks=ranks)
    wanted = _orders_wanted(data, num_train_samples)
    built = not builder
    try:
        if builder:
            for dataset, epoch in wanted:
                dataset.document_order(epoch)
            built = not cache.failed
    finally:  # as above
        written = ranks.all_true(built)
    if written and not builder:
        for dataset, epoch in wanted:
            cache.promise(dataset.cache_name(epoch), patience_s=PATIENCE_S)
    logger.info("%d document orders ready after %.1f s", len(wanted), time.monotonic() - started_s)


def _orders_wanted(data: TrainingData, num_train_samples: int) -> list[tuple[Dataset, int]]:
    blend = data.train.dataset
    wanted = [
        (dataset, epoch)
        for dataset, num_epochs in zip(blend.datasets, blend.num_epochs(num_train_samples), strict=True)
        for epoch in range(min(max(1, num_epochs), MAX_EPOCHS_AHEAD))
    ]
    for source in (*data.validation.values(), *data.test.values()):
        wanted += [(dataset, 0) for dataset in source.dataset.datasets]
    return wanted


def _cache_beside(config: DataConfig) -> Path:
    first = next(ref for ref in config.train if ref.weight)
    return Path(first.path).expanduser().parent / CACHE_NAME
