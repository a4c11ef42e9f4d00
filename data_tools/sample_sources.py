"""From a configuration and its open corpora to sample sources: splits, blends, held-out sets.

A split gives each part a contiguous run of each train corpus's documents, as Megatron's does, so both hold out
the same ones; a text is never cut between training and validation.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.blended_dataset import BlendedDataset, Dataset
from data_tools.config import SPLIT_PARTS, CorpusRef, DataConfig, parse_split
from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.gpt_dataset import GPTDataset
from data_tools.index_cache import IndexCache
from data_tools.loader import SampleSource
from data_tools.masked_batches import NUM_SPECIAL, MaskedBatches
from data_tools.objectives import FillInTheMiddle, MaskedLM, PrefixLM, SpanCorruption
from data_tools.piece_dataset import PieceDataset
from data_tools.rearranged import MiddleLast, PrefixBatches
from data_tools.span_corruption import CorruptedBatches, lengths
from data_tools.special_tokens import special_tokens
from data_tools.tokenizer import Tokenizer
from data_tools.words import WordTable

logger = logging.getLogger(__name__)

TRAIN, VALID, TEST = SPLIT_PARTS
WHOLE = (0.0, 1.0)
# Runs that differ in their seed are compared on the same evaluation samples.
EVALUATION_SEED = 0

Datasets = list[tuple[CorpusRef, Dataset]]


class SourceMaker:
    """Makes the sources of one run."""

    def __init__(
        self,
        config: DataConfig,
        corpora: Mapping[str, Corpus],
        *,
        cache: IndexCache,
        text_size: int | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        """``text_size``: ids that a corpus may hold; ``tokenizer``: needed by objectives other than the next token."""
        self._config, self._corpora, self._cache = config, corpora, cache
        self._text_size, self._tokenizer = text_size, tokenizer

    def train(self) -> SampleSource:
        datasets = self._datasets(self._config.train, bounds=self._bounds(TRAIN), seed=self._config.seed)
        return self._source(TRAIN, _all_with_samples(datasets))

    def held_out(self, part: str, named: Mapping[str, tuple[CorpusRef, ...]]) -> dict[str, SampleSource]:
        """The split's part under its own name, if it has a share, then the named sets."""
        sets = {}
        first, last = self._bounds(part)
        if last > first:
            datasets = self._datasets(self._config.train, bounds=(first, last), seed=EVALUATION_SEED)
            sets[part] = self._source(part, _those_with_samples(part, datasets, split=self._config.split))
        for name, refs in named.items():
            datasets = self._datasets(refs, bounds=WHOLE, seed=EVALUATION_SEED)
            sets[name] = self._source(name, _all_with_samples(datasets))
        return sets

    def _bounds(self, part: str) -> tuple[float, float]:
        shares, number = parse_split(self._config.split), SPLIT_PARTS.index(part)
        return sum(shares[:number]), sum(shares[: number + 1])

    def _source(self, name: str, datasets: Datasets) -> SampleSource:
        blend = BlendedDataset([dataset for _, dataset in datasets], [ref.weight for ref, _ in datasets])
        seed = self._config.seed if name == TRAIN else EVALUATION_SEED
        return SampleSource(
            name,
            blend,
            reset_at_documents=self._config.documents == "reset",
            mask_boundary_loss=self._config.mask_boundary_loss,
            maker=self._maker(seed),
            rearrange=self._rearranger(seed),
        )

    def _rearranger(self, seed: int) -> MiddleLast | None:
        objective, tokenizer = self._config.objective, self._tokenizer
        if not isinstance(objective, FillInTheMiddle) or tokenizer is None:
            return None
        special = special_tokens(tokenizer, objective)
        return MiddleLast(objective, special, seed=seed, end=tokenizer.end_of_document)

    def _maker(self, seed: int) -> MaskedBatches | CorruptedBatches | PrefixBatches | None:
        objective, tokenizer, length = self._config.objective, self._tokenizer, self._config.sequence_length
        if objective is None or tokenizer is None:
            return None
        special = special_tokens(tokenizer, objective)
        if isinstance(objective, MaskedLM):
            return MaskedBatches(objective, special, WordTable(tokenizer), length=length, seed=seed)
        if isinstance(objective, SpanCorruption):
            end = tokenizer.end_of_document
            return CorruptedBatches(objective, special, length=length, seed=seed, end=end)
        return PrefixBatches(length=length, seed=seed) if isinstance(objective, PrefixLM) else None

    def _datasets(self, refs: Sequence[CorpusRef], *, bounds: tuple[float, float], seed: int) -> Datasets:
        return [
            (ref, self._dataset(self._corpora[ref.path], bounds, seed=seed)) for ref in refs if ref.weight
        ]

    def _dataset(self, corpus: Corpus, bounds: tuple[float, float], *, seed: int) -> Dataset:
        # Rounded as in megatron/core/datasets/blended_megatron_dataset_builder.py.
        first, last = (round(bound * corpus.index.num_documents) for bound in bounds)
        length, objective = self._config.sequence_length, self._config.objective
        part: dict[str, Any] = {
            "seed": seed,
            "first": first,
            "last": last,
            "cache": self._cache,
            "vocab_size": self._text_size,
        }
        if isinstance(objective, SpanCorruption):
            return GPTDataset(corpus, sequence_length=lengths(objective, length).text, **part)
        if not isinstance(objective, MaskedLM):
            return GPTDataset(corpus, sequence_length=length, **part)
        text = length - NUM_SPECIAL[objective.second_task]
        if objective.second_task == "none":
            return GPTDataset(corpus, sequence_length=text, **part)
        assert self._tokenizer is not None
        return PieceDataset(
            corpus, sequence_length=text, end_of_document=self._tokenizer.end_of_document, **part
        )


def _all_with_samples(datasets: Datasets) -> Datasets:
    for _, dataset in datasets:
        dataset.check()
    return datasets


def _those_with_samples(part: str, datasets: Datasets, *, split: str) -> Datasets:
    """A held-out part may be too small in some corpora, which are then left out of it, but not in all."""
    kept = [(ref, dataset) for ref, dataset in datasets if dataset.samples_per_epoch]
    if not kept:
        raise DataError(_nothing_held_out(part, [dataset for _, dataset in datasets], split=split))
    short = [ref.path for ref, dataset in datasets if not dataset.samples_per_epoch]
    if short:
        logger.warning(
            "data.split=%s gives %r too little text of %s: what there is of the other corpora stands for it",
            *(split, part, ", ".join(short)),
        )
    return kept


def _nothing_held_out(part: str, datasets: list[Dataset], *, split: str) -> str:
    num_documents = sum(dataset.last - dataset.first for dataset in datasets)
    num_tokens = sum(dataset.num_tokens for dataset in datasets)
    length = datasets[0].sequence_length
    return (
        f"data.split={split} leaves {num_documents} documents with {num_tokens} tokens for {part!r}, one sample of "
        f"sequence_length={length} needs {length + 1}: give that part a larger share, or 0 and name a corpus "
        f"for it"
    )
