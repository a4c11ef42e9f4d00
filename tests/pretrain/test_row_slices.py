"""Partitions end anywhere; rows that they cut are known to all, and belong to one."""

from hypothesis import given
from hypothesis import strategies as some

from pretrain.engine.row_slices import RowSlice, Shape, cut_rows, row_slices

SHAPES = some.lists(some.builds(Shape, some.integers(1, 6), some.integers(1, 9)), min_size=1, max_size=6)


def spread(shapes: list[Shape], copies: int) -> tuple[int, list[list[RowSlice]]]:
    """The size of a partition, and what lies in each."""
    partition = -(-sum(shape.elements for shape in shapes) // copies)
    starts = range(0, partition * copies, partition)
    return partition, [list(row_slices(shapes, start=start, stop=start + partition)) for start in starts]


@given(SHAPES, some.integers(1, 7))
def test_every_element_lies_in_one_slice(shapes: list[Shape], copies: int) -> None:
    _, by_rank = spread(shapes, copies)
    for index, shape in enumerate(shapes):
        found = [
            piece.first * piece.columns + piece.lead + element
            for pieces in by_rank
            for piece in pieces
            if piece.tensor == index
            for element in range(piece.size)
        ]
        assert found == list(range(shape.elements))


@given(SHAPES, some.integers(1, 7))
def test_every_row_is_owned_once(shapes: list[Shape], copies: int) -> None:
    _, by_rank = spread(shapes, copies)
    for index, shape in enumerate(shapes):
        owned = [
            row
            for pieces in by_rank
            for piece in pieces
            if piece.tensor == index
            for row in range(piece.first_owned, piece.last)
        ]
        assert owned == list(range(shape.rows))


@given(SHAPES, some.integers(1, 7))
def test_cut_rows_are_those_of_which_somebody_lacks_a_part(shapes: list[Shape], copies: int) -> None:
    partition, by_rank = spread(shapes, copies)
    lacking = set()
    for piece in (piece for pieces in by_rank for piece in pieces):
        lacking |= {(piece.tensor, piece.first)} if piece.lead else set()
        lacking |= {(piece.tensor, piece.last - 1)} if piece.tail else set()
    cut = cut_rows(shapes, partition=partition, copies=copies)
    assert len(cut) == len(set(cut))
    assert {(row.tensor, row.row) for row in cut} == lacking


def test_a_slice_tells_what_it_lacks() -> None:
    (piece,) = row_slices([Shape(4, 10)], start=7, stop=35)
    assert (piece.first, piece.last, piece.lead, piece.tail, piece.first_owned) == (0, 4, 7, 5, 1)
