"""Samples to micro-batches, resumable: the loader's whole state is ``consumed_samples``.

Within a step, micro-batch m of data-parallel rank r holds the samples

    consumed + (m * dp_size + r) * micro_batch_size + [0, micro_batch_size)

so a step takes the same set of samples however many ranks share it.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_tools import packing
from data_tools.blended_dataset import BlendedDataset
from data_tools.errors import DataError
from data_tools.masked_batches import MaskedBatch, MaskedBatches
from data_tools.rearranged import MiddleLast, PrefixBatch, PrefixBatches
from data_tools.span_corruption import CorruptedBatches, StackedBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GPTBatch:
    """One micro-batch."""

    tokens: np.ndarray  # int64 [b s]
    labels: np.ndarray  # int64 [b s], the token after each
    segments: np.ndarray | None  # int32 [b s], None unless attention restarts at documents
    loss_mask: np.ndarray | None  # bool [b s], None where every token counts


Batch = GPTBatch | PrefixBatch | MaskedBatch | StackedBatch


@dataclass(frozen=True)
class StepShape:
    """How a step's samples are dealt out."""

    micro_batch_size: int
    num_micro_batches: int = 1
    dp_rank: int = 0
    dp_size: int = 1

    @property
    def samples_per_step(self) -> int:
        return self.micro_batch_size * self.num_micro_batches * self.dp_size

    def numbers(self, consumed_samples: int) -> list[range]:
        """The samples of each of this rank's micro-batches."""
        firsts = (
            consumed_samples + (micro_batch * self.dp_size + self.dp_rank) * self.micro_batch_size
            for micro_batch in range(self.num_micro_batches)
        )
        return [range(first, first + self.micro_batch_size) for first in firsts]


class SampleSource:
    """A blend of corpora, and how its samples become batches: of the next token, or as ``maker`` makes them."""

    def __init__(
        self,
        name: str,
        dataset: BlendedDataset,
        *,
        reset_at_documents: bool,
        mask_boundary_loss: bool,
        maker: MaskedBatches | CorruptedBatches | PrefixBatches | None = None,
        rearrange: MiddleLast | None = None,
    ):
        self.name, self.dataset = name, dataset
        self._reset_at_documents, self._mask_boundary_loss = reset_at_documents, mask_boundary_loss
        self._maker, self._rearrange = maker, rearrange

    def loader(self, shape: StepShape, *, consumed_samples: int = 0) -> "SampleLoader":
        """An endless loader for training."""
        return SampleLoader(self, shape, consumed_samples=consumed_samples)

    def evaluation(self, shape: StepShape, *, num_samples: int) -> "SampleLoader":
        """A finite loader over the first ``num_samples`` samples: the same set each time, for every shape.

        It is cut to the samples that the set has without repeating.  Where it does not fill the last step,
        that is filled up with samples whose ``loss_mask`` is False, and every batch then has a mask.
        """
        there = self.dataset.num_distinct_samples()
        if there < num_samples:
            logger.info("%s: %d samples asked for, %d are there", self.name, num_samples, there)
        return SampleLoader(self, shape, consumed_samples=0, num_samples=min(num_samples, there))

    def batch(
        self, numbers: Sequence[int], *, num_samples: int | None = None, with_mask: bool = False
    ) -> Batch:
        """The samples of these numbers; those from ``num_samples`` on are fillers that do not count."""
        length = self.dataset.sequence_length
        real = [num_samples is None or number < num_samples for number in numbers]
        there = [number if counts else 0 for number, counts in zip(numbers, real, strict=True)]
        if self._maker is not None:
            return self._maker.batch(self.dataset, there, real)
        if self._rearrange is not None:
            samples = [
                self._rearrange(self.dataset.sample(number), own)
                for number, own in zip(there, numbers, strict=True)
            ]
            tokens = np.stack([sample.tokens for sample in samples])  # [b s+1]
        else:
            samples = [self.dataset.read(number) for number in there]
            tokens = np.stack([sample.tokens for sample in samples])  # [b s+1]
            self.dataset.check_ids(tokens, there)
        segments = mask = None
        if self._reset_at_documents:
            segments = np.stack(
                [packing.segments(sample.starts, sequence_length=length) for sample in samples]
            )
        if self._mask_boundary_loss:
            mask = np.stack([packing.loss_mask(sample.starts, sequence_length=length) for sample in samples])
        if with_mask:
            mask = np.ones((len(samples), length), np.bool_) if mask is None else mask
            mask[~np.array(real)] = False
        return GPTBatch(
            np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:]), segments, mask
        )


class SampleLoader:
    """Iterates over steps: each item is the list of this rank's micro-batches.

    The next step is read in a thread while this one is trained on; nothing depends on whether it is done in
    time.
    """

    def __init__(
        self, source: SampleSource, shape: StepShape, *, consumed_samples: int, num_samples: int | None = None
    ):
        if consumed_samples < 0:
            raise DataError(f"consumed_samples={consumed_samples} is negative: a run begins at 0")
        self.consumed_samples = consumed_samples
        self.num_samples = num_samples
        self._source, self._shape = source, shape
        self._with_mask = num_samples is not None and bool(num_samples % shape.samples_per_step)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"data-{source.name}")
        self._next: Future[list[Batch]] | None = None

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The step at ``consumed_samples``, which then moves on."""
        if self._is_finished():
            self.close()
            raise StopIteration
        ready, self._next = self._next or self._submit(), None
        step = ready.result()
        self.consumed_samples += self._shape.samples_per_step
        if not self._is_finished():
            self._next = self._submit()
        return step

    def __len__(self) -> int:
        """Steps that a finite loader has in all."""
        assert self.num_samples is not None, "an endless loader has no length"
        return -(-self.num_samples // self._shape.samples_per_step)

    def close(self) -> None:
        """End the reading thread; a loader that is dropped without it ends with the process."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _is_finished(self) -> bool:
        return self.num_samples is not None and self.consumed_samples >= self.num_samples

    def _submit(self) -> Future[list[Batch]]:
        return self._thread.submit(self._read, self.consumed_samples)

    def _read(self, consumed_samples: int) -> list[Batch]:
        return [
            self._source.batch(numbers, num_samples=self.num_samples, with_mask=self._with_mask)
            for numbers in self._shape.numbers(consumed_samples)
        ]
