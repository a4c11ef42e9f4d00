"""GaLore: AdamW on hidden matrices' gradients in a subspace of few columns (Zhao et al. 2024, arXiv:2403.03507).

Algorithm 2 of the paper, always from the right: with Q the first r right singular vectors of a gradient G
[rows columns], renewed every `update_gap` steps, Adam sees G Q [rows r] and a weight moves by scale * Adam(G Q) Q'.
The paper projects the shorter side; from the right, each row has its own moments, so ZeRO's partitions keep them where
the rows are, and what is sent is one whole gradient of a matrix in `update_gap` steps.  Embeddings, heads, norms and
biases get plain AdamW, as in the authors' runs (jiaweizzhao/GaLore, torchrun_main.py).  Their package (galore-torch 1.0
of 2024) takes whole tensors only, and needs transformers and bitsandbytes to be imported.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from pretrain.engine.matrix_optimizer import MatrixOptimizer, Slices
from pretrain.engine.row_slices import RowSlice, Shape
from pretrain.optimizer_facts import galore_shape


class GaLore(MatrixOptimizer):
    """``hidden``: ids of the matrices that may be projected; those of which a side has ``rank`` or less are not."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        hidden: Collection[int],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int,
        update_gap: int,
        scale: float,
        embeddings: bool = False,  # whether ``hidden`` has them
    ):
        self._hidden, self._rank = hidden, rank
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, {**defaults, "rank": rank, "update_gap": update_gap, "scale": scale})

    def shape_of(self, parameter: torch.Tensor) -> Shape:
        return galore_shape(tuple(parameter.shape), self._rank, is_hidden=id(parameter) in self._hidden)

    def update(
        self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor, tensors: Slices
    ) -> None:
        """AdamW on what is projected and on what is not; one partition, or one parameter."""
        state = self._state(parameter, tensors, group["rank"])
        rows = tensors.whole_rows(gradient)
        if state["step"] % group["update_gap"] == 0:
            self._renew(rows, state, tensors, group["rank"])
        state["step"] += 1
        bases = self._bases(state["bases"], tensors, group["rank"])
        sizes = [piece.rows * _width(piece, group["rank"]) for piece in tensors.here]
        moments = zip(state["first_moments"].split(sizes), state["second_moments"].split(sizes), strict=True)
        for matrix, basis, piece, both in zip(rows, bases, tensors.here, moments, strict=True):
            seen = matrix if basis is None else matrix @ basis
            step = adam_direction(seen, *both, group, state["step"])
            if basis is not None:
                step = step @ basis.T * group["scale"]
            weight = tensors.part(parameter, piece)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_(tensors.own(step, piece), alpha=group["lr"])

    def _state(self, parameter: torch.Tensor, tensors: Slices, rank: int) -> dict[str, Any]:
        """Flat tensors, slice behind slice: a checkpoint of any optimizer looks so."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            moments = sum(piece.rows * _width(piece, rank) for piece in tensors.here)
            state["first_moments"] = parameter.new_zeros(moments)
            state["second_moments"] = parameter.new_zeros(moments)
            state["bases"] = parameter.new_zeros(
                sum(piece.columns * rank for piece in tensors.here if is_projected(piece))
            )
        return state

    def _renew(self, rows: list[torch.Tensor], state: dict[str, Any], tensors: Slices, rank: int) -> None:
        """Bases from this step's gradients, matrix by matrix; collective."""
        bases = self._bases(state["bases"], tensors, rank)
        here = {piece.tensor: place for place, piece in enumerate(tensors.here)}
        for index, shape in enumerate(tensors.shapes):
            if not is_projected(shape):
                continue
            place = here.get(index)
            mine = rows[0].new_zeros(0, shape.columns) if place is None else rows[place]
            piece = None if place is None else tensors.here[place]
            summed = tensors.sum(_summand(mine, piece, shape))
            if place is not None and (basis := bases[place]) is not None:
                basis.copy_(_leading(summed, shape, rank))

    @staticmethod
    def _bases(flat: torch.Tensor, tensors: Slices, rank: int) -> list[torch.Tensor | None]:
        """Views [columns r] of the slices that are projected."""
        sizes = [piece.columns * rank if is_projected(piece) else 0 for piece in tensors.here]
        return [
            part.view(piece.columns, rank) if is_projected(piece) else None
            for part, piece in zip(flat.split(sizes), tensors.here, strict=True)
        ]


def adam_direction(
    seen: torch.Tensor, first: torch.Tensor, second: torch.Tensor, group: dict[str, Any], step: int
) -> torch.Tensor:
    """Kingma & Ba 2015 (arXiv:1412.6980), algorithm 1: moments move, and what a learning rate multiplies comes back."""
    (beta1, beta2), value = group["betas"], seen.reshape(-1)
    first.lerp_(value, 1 - beta1)
    second.mul_(beta2).addcmul_(value, value, value=1 - beta2)
    root = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
    return (first / (1 - beta1**step)).div_(root).view_as(seen)


def is_projected(one: RowSlice | Shape) -> bool:
    return one.columns > 1


def _width(piece: RowSlice, rank: int) -> int:
    return rank if is_projected(piece) else 1


def _summand(rows: torch.Tensor, piece: RowSlice | None, shape: Shape) -> torch.Tensor:
    """What sums over ranks to G'G [columns columns] of a tall gradient, and to a wide one itself, in fp64.

    A product with itself squares the condition, and a layout's rounding could turn small vectors.
    """
    owned = rows if piece is None else rows[piece.first_owned - piece.first :]
    if shape.columns <= shape.rows:
        return owned.double().T @ owned.double()
    whole = rows.new_zeros(shape.rows, shape.columns, dtype=torch.float64)
    if piece is not None:
        whole[piece.first_owned : piece.last] = owned.double()
    return whole


def _leading(summed: torch.Tensor, shape: Shape, rank: int) -> torch.Tensor:
    """The first right singular vectors [columns rank], largest first, each with its largest number positive.

    From eigenvectors of the smaller of G'G and GG', in a fraction of an SVD's time.  Without the sign, two layouts
    could take opposite vectors for the same.
    """
    if shape.columns <= shape.rows:
        vectors = torch.linalg.eigh(summed).eigenvectors[:, -rank:].flip(1)
    else:
        left = torch.linalg.eigh(summed @ summed.T).eigenvectors[:, -rank:].flip(1)
        vectors = torch.linalg.qr(summed.T @ left).Q
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * largest.sign()
