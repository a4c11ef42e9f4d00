"""Which rows of which matrices lie in a rank's partition of a flat tensor.

ZeRO 1 and 2 lay a group's parameters end to end and give each copy of the model one even piece (Rajbhandari et al.
2020, arXiv:1910.02054, section 5.1), whose ends fall where they fall: inside a matrix, and inside one of its rows.
An optimizer that looks at matrices needs to know where it is.  Plain arithmetic, no torch: an estimate asks it too.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Shape(NamedTuple):
    """A tensor as an optimizer sees it; a vector is one row."""

    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns


class RowSlice(NamedTuple):
    """The rows of one tensor of which a rank holds a part, the outer ones perhaps cut."""

    tensor: int  # its place in the group
    columns: int
    first: int
    last: int  # the first row behind them
    lead: int  # elements of row ``first`` that lie in the partition before
    at: int  # where in the rank's partition they begin
    size: int  # elements that the rank holds

    @property
    def rows(self) -> int:
        return self.last - self.first

    @property
    def tail(self) -> int:
        """Elements of the last row that lie in the partition behind."""
        return self.rows * self.columns - self.lead - self.size

    @property
    def first_owned(self) -> int:
        """A row belongs to the rank that has its first element, so that each is counted once."""
        return self.first + (self.lead > 0)


def row_slices(shapes: Sequence[Shape], *, start: int, stop: int) -> Iterator[RowSlice]:
    """Of the elements ``start`` to ``stop`` of all tensors end to end; what lies behind the last is padding."""
    offset = 0
    for index, (rows, columns) in enumerate(shapes):
        begin, end = max(start, offset), min(stop, offset + rows * columns)
        if begin < end:
            first, lead = divmod(begin - offset, columns)
            last = -(-(end - offset) // columns)
            yield RowSlice(index, columns, first, last, lead, begin - start, end - begin)
        offset += rows * columns


class CutRow(NamedTuple):
    """A row that two or more partitions share."""

    tensor: int
    row: int
    columns: int


def cut_rows(shapes: Sequence[Shape], *, partition: int, copies: int) -> list[CutRow]:
    """Those that a boundary between partitions of ``partition`` elements goes through, each once, in order."""
    found: dict[CutRow, None] = {}
    offset = index = 0
    for boundary in range(partition, partition * copies, partition):
        while index < len(shapes) and offset + shapes[index].elements <= boundary:
            offset += shapes[index].elements
            index += 1
        if index == len(shapes):
            break
        row, inside = divmod(boundary - offset, shapes[index].columns)
        if inside:
            found[CutRow(index, row, shapes[index].columns)] = None
    return list(found)
