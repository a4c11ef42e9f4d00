import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_tools import packing

LENGTH = 8
STARTS = st.sets(st.integers(0, LENGTH)).map(lambda places: np.array(sorted(places), dtype=np.int64))


def test_an_example() -> None:
    starts = np.array([0, 3, 4, 8])  # documents of 3, 1 and 4 inputs; the label of the last begins a fourth
    ids = packing.segments(starts, sequence_length=LENGTH)
    assert ids.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert ids.dtype == np.int32
    assert packing.positions(ids).tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert packing.cu_seqlens(ids[None]).tolist() == [0, 3, 4, 8]
    assert packing.loss_mask(starts, sequence_length=LENGTH).tolist() == [True, True, False, False] + [
        True
    ] * 3 + [False]


@given(starts=STARTS)
def test_segments_positions_and_lengths_agree(starts: np.ndarray) -> None:
    ids = packing.segments(starts, sequence_length=LENGTH)
    positions, bounds = packing.positions(ids), packing.cu_seqlens(ids[None])
    assert ids[0] == 0 and set(np.diff(ids)) <= {0, 1}
    assert np.flatnonzero(positions == 0).tolist() == bounds[:-1].tolist()
    assert np.diff(bounds).tolist() == np.bincount(ids).tolist()
    assert set(bounds[1:-1]) == set(starts) - {0, LENGTH}


@given(starts=STARTS)
def test_the_loss_counts_exactly_where_label_and_input_are_of_one_document(starts: np.ndarray) -> None:
    of_tokens = packing.segments(starts, sequence_length=LENGTH + 1)  # of all s + 1 tokens
    mask = packing.loss_mask(starts, sequence_length=LENGTH)
    assert mask.tolist() == (of_tokens[:-1] == of_tokens[1:]).tolist()


def test_rows_of_a_batch_are_apart() -> None:
    ids = np.array([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 2]], dtype=np.int32)
    assert packing.cu_seqlens(ids).tolist() == [0, 2, 4, 8, 9, 10, 12]
    assert packing.positions(ids).tolist() == [[0, 1, 0, 1], [0, 1, 2, 3], [0, 0, 0, 1]]
