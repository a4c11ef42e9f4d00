"""Adafactor under ZeRO: torch's update, with rows and columns summed over the ranks that share a matrix.

Shazeer & Stern 2018 (arXiv:1804.04235), algorithm 4, as `torch.optim.Adafactor` has it (torch/optim/_adafactor.py:
means for sums, eps1 where it guards a division, decoupled weight decay).  That one takes whole tensors, and stays the
one that is used where there are whole tensors; under ZeRO it would take a partition of thousands of parameters for one
vector and keep a whole second moment.  Every rank keeps the statistics of all of its group's tensors: they are a few
thousandths of the weights, and equal on all ranks, so nothing is sent but what is summed anyway.
"""

from collections.abc import Sequence
from typing import Any

import torch

from pretrain.engine.matrix_optimizer import MatrixOptimizer, Slices
from pretrain.engine.row_slices import RowSlice


class ShardedAdafactor(MatrixOptimizer):
    """The arguments are `torch.optim.Adafactor`'s."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
    ):
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": tuple(eps),
            "d": d,
            "weight_decay": weight_decay,
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            group["is_vector"] = [parameter.dim() < 2 for parameter in group["params"]]

    def update(
        self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor, tensors: Slices
    ) -> None:
        """One partition; every rank of it does the same sums in the same order."""
        state = self._state(parameter, tensors)
        state["step"] += 1
        keep = 1 - state["step"] ** group["beta2_decay"]
        eps1 = torch.finfo(parameter.dtype).eps if group["eps"][0] is None else group["eps"][0]
        rows = tensors.whole_rows(gradient)
        squares = self._sum_squares(rows, parameter, state, tensors, 1 - keep)
        norms = parameter.new_zeros(len(tensors.shapes))
        for matrix, piece in zip(rows, tensors.here, strict=True):
            direction = self._direction(matrix, piece, group, state, tensors, eps1)
            own = tensors.part(gradient, piece)  # which nobody reads any more
            own.copy_(tensors.own(direction, piece))
            norms[piece.tensor] = own.square().sum()
        rms = (tensors.sum(norms) / self._elements(tensors, norms)).sqrt()
        scale = squares.sqrt().clamp(min=group["eps"][1]) * min(group["lr"], state["step"] ** -0.5)
        scale /= (rms / group["d"]).clamp(min=1.0)
        for piece in tensors.here:
            weight, direction = tensors.part(parameter, piece), tensors.part(gradient, piece)
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction.mul_(scale[piece.tensor]))

    def _state(self, parameter: torch.Tensor, tensors: Slices) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["rows"] = parameter.new_zeros(sum(shape.rows for shape in tensors.shapes))
            state["columns"] = parameter.new_zeros(sum(shape.columns for shape in tensors.shapes))
        return state

    def _sum_squares(
        self,
        gradients: list[torch.Tensor],
        parameter: torch.Tensor,
        state: dict[str, Any],
        tensors: Slices,
        weight: float,
    ) -> torch.Tensor:
        """Move row and column means towards this step's; the mean square of each tensor's weights."""
        sizes = [len(state["rows"]), len(state["columns"]), len(tensors.shapes)]
        rows, columns, weights = (sums := parameter.new_zeros(sum(sizes))).split(sizes)
        by_row, by_column = self._split(rows, columns, tensors)
        for gradient, piece in zip(gradients, tensors.here, strict=True):
            owned = gradient[piece.first_owned - piece.first :].square()
            by_row[piece.tensor][piece.first_owned : piece.last] = owned.mean(dim=1)
            by_column[piece.tensor][:] = owned.sum(dim=0) / tensors.shapes[piece.tensor].rows
            weights[piece.tensor] = tensors.part(parameter, piece).square().sum()
        tensors.sum(sums)
        state["rows"].lerp_(rows, weight)
        state["columns"].lerp_(columns, weight)
        return weights / self._elements(tensors, weights)

    def _direction(
        self,
        gradient: torch.Tensor,
        piece: RowSlice,
        group: dict[str, Any],
        state: dict[str, Any],
        tensors: Slices,
        eps1: float,
    ) -> torch.Tensor:
        """[rows columns] of a gradient over the root of its estimated square."""
        by_row, by_column = self._split(state["rows"], state["columns"], tensors)
        row, column = by_row[piece.tensor], by_column[piece.tensor]
        if group["is_vector"][piece.tensor]:
            variance = column.expand_as(gradient).clone()
        else:
            variance = torch.outer(row[piece.first : piece.last], column).div_(row.mean().clamp(min=eps1))
        return variance.clamp_(min=eps1**2).rsqrt_().mul_(gradient)

    @staticmethod
    def _split(
        rows: torch.Tensor, columns: torch.Tensor, tensors: Slices
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        return rows.split([s.rows for s in tensors.shapes]), columns.split(
            [s.columns for s in tensors.shapes]
        )

    @staticmethod
    def _elements(tensors: Slices, like: torch.Tensor) -> torch.Tensor:
        return like.new_tensor([shape.elements for shape in tensors.shapes])
