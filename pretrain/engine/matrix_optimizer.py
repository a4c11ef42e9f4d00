"""An optimizer that looks at whole rows and matrices, and does so also where ZeRO has cut them.

DeepSpeed puts one flat partition in the place of a group's parameters.  This base class keeps what the partition is
made of, brings rows that a boundary cuts together (one small sum over the copies of the model), and leaves the rule of
an update to a subclass, which sees tensors as slices of rows.  Without ZeRO each parameter is one slice, whole.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pretrain.engine.row_slices import CutRow, RowSlice, Shape, cut_rows, row_slices


class Spread(NamedTuple):
    """Over which ranks the parameters are partitioned, and which of them this is."""

    rank: int = 0
    copies: int = 1
    group: dist.ProcessGroup | None = None


class MatrixOptimizer(torch.optim.Optimizer):
    """Parameter groups as for any; `partitioned` once, after DeepSpeed has put its partitions in their place."""

    def __init__(self, groups: Sequence[dict[str, Any]], defaults: dict[str, Any]):
        super().__init__(groups, defaults)
        for group in self.param_groups:
            group["shapes"] = [list(self.shape_of(parameter)) for parameter in group["params"]]
        self._spread = Spread()
        self._is_partitioned = False

    def shape_of(self, parameter: torch.Tensor) -> Shape:
        """As what the update takes a tensor: rows that belong together, a vector as one."""
        return (
            Shape(parameter.numel() // parameter.shape[-1], parameter.shape[-1])
            if parameter.dim()
            else Shape(1, 1)
        )

    @abstractmethod
    def update(
        self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor, tensors: "Slices"
    ) -> None:
        """Step one parameter, or one partition of many; the gradient may be written over."""

    def partitioned(self, spread: Spread) -> None:
        """The parameters are now flat partitions, in the order of ranks of ``spread``."""
        self._spread, self._is_partitioned = spread, True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self.update(group, parameter, parameter.grad, self._slices(group, index))

    def _slices(self, group: dict[str, Any], index: int) -> "Slices":
        shapes = [Shape(*shape) for shape in group["shapes"]]
        if self._is_partitioned:
            return Slices(shapes, group["params"][index].numel(), self._spread)
        return Slices([shapes[index]], group["params"][index].numel(), Spread())


class Slices:
    """The tensors of a partition, or the one tensor of a parameter."""

    def __init__(self, shapes: Sequence[Shape], partition: int, spread: Spread):
        self.shapes, self._spread = shapes, spread
        start = spread.rank * partition
        self.here: list[RowSlice] = list(row_slices(shapes, start=start, stop=start + partition))
        self._cut: list[CutRow] = cut_rows(shapes, partition=partition, copies=spread.copies)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over the ranks that hold the partitions, in place."""
        if self._spread.copies > 1:
            dist.all_reduce(tensor, group=self._spread.group)
        return tensor

    def part(self, flat: torch.Tensor, piece: RowSlice) -> torch.Tensor:
        """What this rank holds of a slice, flat: a view."""
        return flat.reshape(-1)[piece.at : piece.at + piece.size]

    def own(self, matrix: torch.Tensor, piece: RowSlice) -> torch.Tensor:
        """[rows columns] of a slice -> what this rank holds of it, flat."""
        return matrix.reshape(-1)[piece.lead : piece.lead + piece.size]

    def whole_rows(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each slice as [rows columns], cut rows brought together; collective."""
        cut = self._exchange(flat)
        return [self._whole(flat, piece, cut) for piece in self.here]

    def _exchange(self, flat: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
        """All cut rows, whole, by tensor and row."""
        if not self._cut:
            return {}
        buffer = flat.new_zeros(sum(row.columns for row in self._cut))
        rows = dict(
            zip(
                ((r.tensor, r.row) for r in self._cut),
                buffer.split([r.columns for r in self._cut]),
                strict=True,
            )
        )
        for piece in self.here:
            mine = self.part(flat, piece)
            if piece.lead:
                inside = min(piece.size, piece.columns - piece.lead)
                rows[piece.tensor, piece.first][piece.lead : piece.lead + inside] = mine[:inside]
            if piece.tail and (piece.rows > 1 or not piece.lead):
                inside = piece.columns - piece.tail
                rows[piece.tensor, piece.last - 1][:inside] = mine[piece.size - inside :]
        self.sum(buffer)
        return rows

    def _whole(
        self, flat: torch.Tensor, piece: RowSlice, cut: dict[tuple[int, int], torch.Tensor]
    ) -> torch.Tensor:
        mine = self.part(flat, piece)
        if not piece.lead and not piece.tail:
            return mine.view(piece.rows, piece.columns)
        matrix = flat.new_empty(piece.rows, piece.columns)
        self.own(matrix, piece).copy_(mine)
        if piece.lead:
            matrix[0] = cut[piece.tensor, piece.first]
        if piece.tail:
            matrix[-1] = cut[piece.tensor, piece.last - 1]
        return matrix
