from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.blended_dataset import BlendedDataset
from data_tools.errors import DataError
from data_tools.indexed import IndexedReader
from data_tools.loader import GPTBatch, SampleLoader, SampleSource, StepShape
from data_tools.packing import loss_mask, segments
from tests.data_tools.test_gpt_dataset import dataset, numbered

S = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SampleSource:
    return make_source(tmp_path_factory.mktemp("loader"))


def make_source(folder: Path, *, reset: bool = False, mask: bool = False) -> SampleSource:
    parts = [
        dataset(numbered(folder / name, lengths), s=S) for name, lengths in (("a", [9] * 5), ("b", [7] * 20))
    ]
    blended = BlendedDataset(parts, [1, 2])
    return SampleSource("train", blended, reset_at_documents=reset, mask_boundary_loss=mask)


def take(loader: SampleLoader, num_steps: int) -> list[list[GPTBatch]]:
    steps = [next(loader) for _ in range(num_steps)]
    loader.close()
    return steps


def rows(steps: list[list[GPTBatch]]) -> list[tuple[int, ...]]:
    return [tuple(row) for step in steps for batch in step for row in batch.tokens]


@given(
    micro_batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    dp_size=st.integers(1, 4),
    consumed=st.integers(0, 99),
)
def test_the_ranks_of_a_step_share_its_samples_out(
    micro_batch: int, accumulation: int, dp_size: int, consumed: int
) -> None:
    shapes = [StepShape(micro_batch, accumulation, rank, dp_size) for rank in range(dp_size)]
    dealt = [shape.numbers(consumed) for shape in shapes]
    all_numbers = sorted(number for ranges in dealt for numbers in ranges for number in numbers)
    assert all_numbers == list(range(consumed, consumed + shapes[0].samples_per_step))
    for m in range(accumulation):
        for rank in range(dp_size):
            assert dealt[rank][m][0] == consumed + (m * dp_size + rank) * micro_batch


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "dp_size"), [(12, 1, 1), (3, 2, 2), (1, 4, 3), (2, 6, 1)]
)
def test_the_set_of_samples_of_a_step_does_not_depend_on_how_it_is_shared(
    source: SampleSource, micro_batch: int, accumulation: int, dp_size: int
) -> None:
    expected = [source.dataset.sample(number).tokens[:-1] for number in range(24)]
    for step in range(2):
        seen = []
        for rank in range(dp_size):
            shape = StepShape(micro_batch, accumulation, rank, dp_size)
            seen += rows(take(source.loader(shape, consumed_samples=12 * step), 1))
        assert sorted(seen) == sorted(tuple(tokens) for tokens in expected[12 * step : 12 * step + 12])


def test_labels_are_the_next_tokens(source: SampleSource) -> None:
    (batch,) = take(source.loader(StepShape(3)), 1)[0]
    for row in range(3):
        tokens = source.dataset.sample(row).tokens
        assert batch.tokens[row].tolist() == tokens[:-1].tolist()
        assert batch.labels[row].tolist() == tokens[1:].tolist()
    assert (batch.tokens.dtype, batch.labels.dtype) == (np.int64, np.int64)
    assert batch.labels.flags.c_contiguous and batch.segments is None and batch.loss_mask is None


def test_resuming_equals_running_through_even_across_epochs_and_shapes(source: SampleSource) -> None:
    through = rows(take(source.loader(StepShape(2, 3)), 40))
    assert len(through) > 2 * sum(part.samples_per_epoch for part in source.dataset.datasets)
    loader = source.loader(StepShape(2, 3))
    first = rows(take(loader, 17))
    assert loader.consumed_samples == 17 * 6, "what was read ahead does not count"
    second = rows(take(source.loader(StepShape(3), consumed_samples=loader.consumed_samples), 46))
    assert first + second == through


def test_reading_ahead_changes_nothing(source: SampleSource) -> None:
    ahead = rows(take(source.loader(StepShape(2)), 5))
    alone = [rows(take(source.loader(StepShape(2), consumed_samples=2 * step), 1)) for step in range(5)]
    assert ahead == [row for step in alone for row in step]


def test_a_fault_while_reading_reaches_the_training_loop(
    source: SampleSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = source.loader(StepShape(1))
    next(loader)

    def torn(number: int) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(source.dataset, "read", torn)
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in range(3):
            next(loader)
    loader.close()


def test_segments_and_mask_follow_the_document_starts(tmp_path: Path) -> None:
    source = make_source(tmp_path, reset=True, mask=True)
    (batch,) = take(source.loader(StepShape(6)), 1)[0]
    assert batch.segments is not None and batch.loss_mask is not None
    for row in range(6):
        starts = source.dataset.sample(row).starts
        assert batch.segments[row].tolist() == segments(starts, sequence_length=S).tolist()
        assert batch.loss_mask[row].tolist() == loss_mask(starts, sequence_length=S).tolist()
    assert batch.segments.max() > 0 and not batch.loss_mask.all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2), (3, 2, 2), (16, 1, 1)])
def test_an_evaluation_sees_the_same_samples_each_time_whatever_the_shape(
    source: SampleSource, shape: tuple[int, int, int]
) -> None:
    micro_batch, accumulation, dp_size = shape
    for _ in range(2):
        seen, lengths = [], set()
        for rank in range(dp_size):
            loader = source.evaluation(StepShape(micro_batch, accumulation, rank, dp_size), num_samples=10)
            steps = list(loader)
            lengths.add(len(steps))
            assert len(steps) == len(loader)
            for batch in (batch for step in steps for batch in step):
                counted = (
                    np.ones(len(batch.tokens), bool)
                    if batch.loss_mask is None
                    else batch.loss_mask.all(axis=1)
                )
                seen += [tuple(row) for row in batch.tokens[counted]]
        assert sorted(seen) == sorted(
            tuple(source.dataset.sample(number).tokens[:-1]) for number in range(10)
        )
        assert len(lengths) == 1, "ranks must take the same number of steps"


def test_an_evaluation_that_fills_its_steps_has_no_mask(source: SampleSource) -> None:
    assert all(step[0].loss_mask is None for step in source.evaluation(StepShape(5), num_samples=10))
    assert all(step[0].loss_mask is not None for step in source.evaluation(StepShape(4), num_samples=10))


def test_an_evaluation_never_repeats_a_sample(source: SampleSource) -> None:
    loader = source.evaluation(StepShape(1), num_samples=10_000)
    assert loader.num_samples == source.dataset.num_distinct_samples()
    assert len(rows(list(loader))) == loader.num_samples
    for number in range(loader.num_samples):
        which, within = source.dataset.blend.locate(number)
        assert within < source.dataset.datasets[which].samples_per_epoch


def test_a_negative_position_is_told(source: SampleSource) -> None:
    with pytest.raises(DataError, match="consumed_samples=-1 is negative"):
        source.loader(StepShape(1), consumed_samples=-1)


@pytest.mark.parametrize("limit", [None, 5 << 8])
def test_an_id_beyond_the_vocabulary_is_told_with_its_place(tmp_path: Path, limit: int | None) -> None:
    """`numbered` gives each token its document and place: the largest id is in the last of them."""
    prefix = numbered(tmp_path / "c", [9] * 5)
    largest = int(IndexedReader(prefix).tokens.max())
    source = SampleSource(
        "train",
        BlendedDataset([dataset(prefix, s=S, vocab_size=limit and largest)], [1]),
        reset_at_documents=False,
        mask_boundary_loss=False,
    )
    document, offset = IndexedReader(prefix).locate(int(IndexedReader(prefix).tokens.argmax()))
    numbers = list(range(source.dataset.num_distinct_samples()))
    if limit is None:
        source.batch(numbers)
        return
    for read in (
        lambda: source.batch(numbers),
        lambda: [source.dataset.sample(number) for number in numbers],
    ):
        with pytest.raises(DataError, match=f"token {offset} of document {document} is id {largest}, beyond"):
            read()
