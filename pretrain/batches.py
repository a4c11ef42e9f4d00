"""From the loader's arrays to what the engines take, with weights that make every layout compute the same mean.

A loss is a weighted sum over tokens.  Engines average such sums over micro-batches and data-parallel ranks, so
the weights of a whole step are made to add up to (micro-batches x ranks): the result is then the mean over all
counted tokens of the global batch, even where masks leave some micro-batches with fewer tokens than others.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from data_tools.background_check import BackgroundCheck
from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.loader import Batch, GPTBatch, SampleLoader, SampleSource, StepShape
from data_tools.masked_batches import MaskedBatch
from data_tools.ranks import Ranks
from data_tools.rearranged import PrefixBatch
from data_tools.span_corruption import StackedBatch
from data_tools.training_data import TrainingData, open_data
from model_providers.layer_plan import BERTInputs, ElectraInputs, GPTInputs, T5Inputs
from model_providers.layout import Layout
from pretrain.config_io import Run
from pretrain.engine.base import MicroBatch
from pretrain.engine.groups import Groups
from pretrain.monitor.heartbeat import VERIFIES, Heartbeat

StepBatches = Sequence[MicroBatch | None]  # None on pipeline stages that hold neither inputs nor the loss


class Copies(Protocol):
    """How many copies of the model share a batch out, and where this one is: `Groups`, or a single process."""

    @property
    def layout(self) -> Layout: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dp(self) -> Any: ...


def open_run_data(run: Run, groups: Groups, heartbeat: Heartbeat | None = None) -> TrainingData:
    """All data of a run; every rank calls it, one of them builds the indices, one on each node verifies the files."""

    def first_told(text: str | None) -> str | None:
        where = "" if groups.is_first else f" (rank {groups.rank}, on {socket.gethostname()})"
        return groups.first_told(text and f"{text}{where}")

    ranks = Ranks(
        is_global_first=groups.is_first,
        is_first_on_node=os.environ.get("LOCAL_RANK", "0") == "0",
        all_true=lambda flag: not groups.any_rank(not flag),
        first_told=first_told,
        doing=lambda text: (heartbeat or Heartbeat()).doing(f"{VERIFIES}: {text}"),
    )
    return open_data(run.config.data, num_train_samples=run.config.train.steps * run.global_size, ranks=ranks)


class Feed:
    """A run's training steps, on the device; its whole state is what it has consumed.

    ``unverified``: corpora that this rank reads from end to end meanwhile; what is wrong with them ends the run.
    """

    def __init__(
        self,
        source: SampleSource,
        run: Run,
        groups: Groups,
        *,
        consumed_samples: int,
        consumed_tokens: int = 0,
        unverified: Sequence[Corpus] = (),
    ):
        self.consumed_samples, self.consumed_tokens = consumed_samples, consumed_tokens
        self._check = BackgroundCheck(unverified)
        self._groups, self._num_micro_batches = groups, run.num_micro_batches
        self.samples_per_step, self._tokens_per_step = run.global_size, run.tokens_per_step
        self._loader: SampleLoader | None = None
        if holds_data(groups):
            shape = step_shape(groups, micro_size=run.micro_size, num_micro_batches=run.num_micro_batches)
            self._loader = source.loader(shape, consumed_samples=consumed_samples)

    def next_step(self) -> StepBatches:
        """This rank's micro-batches of the next step.

        Raises:
            DataError: they hold what no vocabulary has, or a corpus is not what was prepared; on this rank alone.
        """
        if self._check.fault is not None:
            raise DataError(self._check.fault)
        self.consumed_samples += self.samples_per_step
        self.consumed_tokens += self._tokens_per_step
        if self._loader is None:
            return [None] * self._num_micro_batches
        return to_device(next(self._loader), self._groups)

    def close(self) -> None:
        """End the reading threads."""
        self._check.close()
        if self._loader is not None:
            self._loader.close()


def evaluation_steps(
    source: SampleSource, groups: Groups, *, micro_size: int, num_samples: int
) -> Iterator[tuple[StepBatches, int]]:
    """The first ``num_samples`` samples of a set, one micro-batch per rank and step, and what counts of this rank's.

    The same samples whatever the layout: where they do not fill the last step, fillers of no weight do.
    """
    shape = step_shape(groups, micro_size=micro_size, num_micro_batches=1)
    there = min(num_samples, source.dataset.num_distinct_samples())
    loader = source.evaluation(shape, num_samples=num_samples) if holds_data(groups) else None
    for _ in range(0, there, shape.samples_per_step):
        if loader is None:
            yield [None], 0
        else:
            found = next(loader)
            yield to_device(found, groups), sum(_num_counted(batch) for batch in found)
    if loader is not None:
        loader.close()


def step_shape(groups: Groups, *, micro_size: int, num_micro_batches: int) -> StepShape:
    return StepShape(micro_size, num_micro_batches, groups.place.dp, groups.layout.dp)


def holds_data(groups: Groups) -> bool:
    """Whether this rank's pipeline stage reads tokens or labels."""
    return groups.holds_inputs or groups.holds_loss


def to_device(batches: Sequence[Batch], groups: Copies) -> list[MicroBatch]:
    """A step's micro-batches; collective over the data-parallel group where losses are masked."""
    weights = _token_weights(batches, groups)
    return [
        MicroBatch(inputs_of(batch, groups.device), (_tensor(batch.labels, groups.device), weight, *more))
        for batch, weight, more in zip(batches, weights, _sentences(batches, groups), strict=True)
    ]


def inputs_of(batch: Batch, device: torch.device) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """What the plan's first layer takes, in wire form."""
    tokens, segments = _tensor(batch.tokens, device), _tensor(batch.segments, device)
    if isinstance(batch, GPTBatch | PrefixBatch):
        return GPTInputs(tokens, segments).to_wire()
    if isinstance(batch, StackedBatch):
        return T5Inputs(tokens, _tensor(batch.targets, device), segments).to_wire()
    if batch.replaced:
        asked = _tensor(batch.loss_mask, device).int()
        return ElectraInputs(tokens, _tensor(batch.labels, device), asked).to_wire()
    return BERTInputs(tokens, _tensor(batch.types, device), segments).to_wire()


def _sentences(batches: Sequence[Batch], groups: Copies) -> list[tuple[torch.Tensor, ...]]:
    """Labels and weights [b] of a second task per micro-batch; weights add up as the tokens' do.

    Of ELECTRA the samples' weights alone.
    """
    if not isinstance(batches[0], MaskedBatch) or batches[0].counts is None:
        return [()] * len(batches)
    there = [_tensor(batch.counts, groups.device).float() for batch in batches]  # type: ignore[union-attr]
    weights = _spread(there, groups)
    if batches[0].replaced:
        return [(weight,) for weight in weights]
    return [
        (_tensor(batch.sentence_labels, groups.device), weight)  # type: ignore[union-attr]
        for batch, weight in zip(batches, weights, strict=True)
    ]


def _token_weights(batches: Sequence[Batch], groups: Copies) -> list[torch.Tensor]:
    """[b s] per micro-batch, adding up to (micro-batches x data-parallel ranks) over the step."""
    if all(batch.loss_mask is None for batch in batches):
        shape = batches[0].labels.shape
        even = torch.full((1, 1), 1.0 / batches[0].labels.size, device=groups.device)
        return [even.expand(shape)] * len(batches)
    return _spread([_tensor(batch.loss_mask, groups.device).float() for batch in batches], groups)


def _num_counted(batch: Batch) -> int:
    """Tokens of which something is asked."""
    return int(batch.labels.size if batch.loss_mask is None else batch.loss_mask.sum())


def _spread(masks: list[torch.Tensor], groups: Copies) -> list[torch.Tensor]:
    """What counts, weighted alike over all micro-batches and data-parallel ranks; collective."""
    counted = torch.stack([mask.sum(dtype=torch.float64) for mask in masks]).sum()
    if groups.layout.dp > 1:
        dist.all_reduce(counted, group=groups.dp)
    share = len(masks) * groups.layout.dp / max(1.0, counted.item())
    return [mask * share for mask in masks]


def _tensor(array, device: torch.device):  # type: ignore[no-untyped-def]
    return None if array is None else torch.from_numpy(array).to(device, non_blocking=True)
