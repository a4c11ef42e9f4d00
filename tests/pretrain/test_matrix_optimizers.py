"""Adafactor is torch's and GaLore the paper's, also where partitions cut matrices anywhere."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim import Adafactor

from pretrain.engine.adafactor import ShardedAdafactor
from pretrain.engine.galore import GaLore
from pretrain.engine.matrix_optimizer import MatrixOptimizer, Spread
from tests.ranks import RankPool

SHAPES = ((7, 5), (11,), (4, 9), (1, 6), (13, 8))  # tall, a vector, wide, one row, tall
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
GALORE: dict[str, Any] = {**SETTINGS, "rank": 3, "update_gap": 2, "scale": 0.5}
STEPS = 5


def weights() -> list[torch.nn.Parameter]:
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    torch.manual_seed(100 + step)
    return [torch.randn(shape) * 0.01 for shape in SHAPES]


def made(kind: str, parameters: list[torch.nn.Parameter]) -> MatrixOptimizer:
    groups = [{"params": parameters}]
    if kind == "Adafactor":
        return ShardedAdafactor(groups, **SETTINGS)
    return GaLore(groups, hidden={id(parameter) for parameter in parameters}, **GALORE)


def stepped(optimizer: Any, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Weights after some steps."""
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def in_partitions(kind: str) -> list[torch.Tensor]:
    """The same over the ranks that are there, each of which holds an even piece of all tensors end to end."""
    parameters, copies, rank = weights(), dist.get_world_size(), dist.get_rank()
    optimizer = made(kind, parameters)
    size = -(-sum(parameter.numel() for parameter in parameters) // copies)

    def piece(tensors: list[torch.Tensor]) -> torch.Tensor:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        padded = torch.cat([flat, flat.new_zeros(size * copies - len(flat))])
        return padded[rank * size : (rank + 1) * size].clone()

    partition = torch.nn.Parameter(piece([parameter.detach() for parameter in parameters]))
    optimizer.param_groups[0]["params"] = [partition]
    optimizer.partitioned(Spread(rank, copies, dist.group.WORLD))
    for step in range(STEPS):
        partition.grad = piece(gradients(step))
        optimizer.step()
    pieces = [torch.empty(size) for _ in range(copies)]
    dist.all_gather(pieces, partition.detach())
    flat = torch.cat(pieces)
    parts = flat[: sum(parameter.numel() for parameter in parameters)].split([p.numel() for p in parameters])
    return [part.view_as(parameter).clone() for part, parameter in zip(parts, parameters, strict=True)]


def test_adafactor_is_torchs() -> None:
    ours, theirs = weights(), weights()
    found = stepped(made("Adafactor", ours), ours)
    expected = stepped(Adafactor(theirs, foreach=False, **SETTINGS), theirs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_galore_is_the_papers() -> None:
    """Algorithm 2 (Zhao et al. 2024), from the right, by an SVD; AdamW where nothing is gained."""
    ours = weights()
    found = stepped(made("GaLore", ours), ours)
    for index, parameter in enumerate(weights()):
        weight, moments = parameter.detach(), (torch.zeros(()), torch.zeros(()))
        is_projected = min(parameter.shape) > GALORE["rank"] and parameter.dim() == 2
        basis = torch.eye(1)
        for step in range(STEPS):
            gradient = gradients(step)[index]
            if is_projected and step % GALORE["update_gap"] == 0:
                basis = torch.linalg.svd(gradient.double()).Vh[: GALORE["rank"]].T.float()
                basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
            seen = gradient @ basis if is_projected else gradient
            moments = (0.9 * moments[0] + 0.1 * seen, 0.999 * moments[1] + 0.001 * seen**2)
            first, second = moments[0] / (1 - 0.9 ** (step + 1)), moments[1] / (1 - 0.999 ** (step + 1))
            update = first / (second.sqrt() + 1e-8)
            update = GALORE["scale"] * update @ basis.T if is_projected else update
            weight = weight * (1 - SETTINGS["lr"] * SETTINGS["weight_decay"]) - SETTINGS["lr"] * update
        torch.testing.assert_close(found[index], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("copies", [2, 4])
@pytest.mark.parametrize("kind", ["Adafactor", "GaLore"])
def test_partitions_take_the_steps_of_whole_tensors(ranks: RankPool, kind: str, copies: int) -> None:
    whole = weights()
    expected = stepped(made(kind, whole), whole)
    for found in ranks.run(in_partitions_of, copies, kind):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def in_partitions_of(kind: str) -> list[torch.Tensor]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return in_partitions(kind)


def test_moments_of_a_projected_matrix_have_as_many_columns_as_the_rank() -> None:
    parameter = torch.nn.Parameter(torch.randn(20, 10))
    optimizer = GaLore([{"params": [parameter]}], hidden={id(parameter)}, **GALORE)
    stepped_once(optimizer, parameter)
    state = optimizer.state[parameter]
    assert (
        state["first_moments"].numel() == 20 * GALORE["rank"]
        and state["bases"].numel() == 10 * GALORE["rank"]
    )
    basis = state["bases"].view(10, GALORE["rank"])
    torch.testing.assert_close(basis.T @ basis, torch.eye(GALORE["rank"]), rtol=0, atol=1e-5)


def stepped_once(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> None:
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
