"""Several datasets as one endless sequence: which of them gives sample i is arithmetic, see `blend`."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from data_tools.blend import Blend
from data_tools.errors import DataError
from data_tools.gpt_dataset import GPTDataset, Sample, first_beyond
from data_tools.piece_dataset import PieceDataset

Dataset = GPTDataset | PieceDataset


class BlendedDataset:
    """Datasets in proportion to ``weights``."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]):
        self.datasets, self.weights = list(datasets), list(weights)
        self.blend = Blend(weights)
        self.sequence_length = self.datasets[0].sequence_length

    def sample(self, number: int) -> Sample:
        """Sample ``number`` of the blend; it depends on nothing but the facts in `fingerprint`."""
        which, within = self.blend.locate(number)
        return self.datasets[which].sample(within)

    def read(self, number: int) -> Sample:
        """The same, with whatever ids it holds: the caller has `check_ids` look at many samples together."""
        dataset, within = self.source_of(number)
        return dataset.read(within) if isinstance(dataset, GPTDataset) else dataset.sample(within)

    def check_ids(self, tokens: np.ndarray, numbers: Sequence[int]) -> None:
        """Refuse tokens [b n] of samples ``numbers`` that the vocabulary does not have."""
        at = first_beyond(tokens, self.datasets[0].vocab_size)
        if at is not None:
            row, offset = divmod(at, tokens.shape[1])
            dataset, within = self.source_of(numbers[row])
            assert isinstance(dataset, GPTDataset)  # others have looked at each sample
            raise DataError(dataset.beyond_vocabulary(within, offset))

    def source_of(self, number: int) -> tuple[Dataset, int]:
        """The dataset that gives sample ``number``, and its number there."""
        which, within = self.blend.locate(number)
        return self.datasets[which], within

    def num_distinct_samples(self) -> int:
        """How many samples there are before the first corpus of the blend begins to repeat."""
        low, high = 0, 1
        while self._without_repeat(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._without_repeat(middle) else (low, middle)
        return low

    def num_epochs(self, num_samples: int) -> list[int]:
        """Passes over each dataset that ``num_samples`` samples begin."""
        counts = self.blend.counts(num_samples)
        return [
            -(-count // dataset.samples_per_epoch)
            for count, dataset in zip(counts, self.datasets, strict=True)
        ]

    def consumed_by_corpus(self, num_samples: int) -> dict[str, int]:
        """How many of the first ``num_samples`` samples came from each corpus."""
        counts = self.blend.counts(num_samples)
        return {dataset.corpus.prefix: count for dataset, count in zip(self.datasets, counts, strict=True)}

    def fingerprint(self) -> str:
        """A hash of everything that determines which tokens sample i holds."""
        total = sum(self.weights)
        facts = [
            [dataset.facts, weight / total]
            for dataset, weight in zip(self.datasets, self.weights, strict=True)
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def samples_hash(self, first: int, num_samples: int) -> str:
        """A hash of the tokens of ``num_samples`` samples from ``first`` on."""
        digest = hashlib.sha256()
        for number in range(first, first + num_samples):
            digest.update(self.sample(number).tokens.tobytes())
        return digest.hexdigest()

    def _without_repeat(self, num_samples: int) -> bool:
        counts = self.blend.counts(num_samples)
        return all(
            count <= dataset.samples_per_epoch for count, dataset in zip(counts, self.datasets, strict=True)
        )
