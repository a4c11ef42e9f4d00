"""Lion as in algorithm 2 of arXiv:2302.06675: what has no gradient does not move, on any device and of any size."""

import pytest
import torch
from deepspeed.ops.lion import DeepSpeedCPULion

from pretrain.engine.lion import BLOCK, Lion


def by_the_paper(weight: torch.Tensor, gradients: list[torch.Tensor], *, decay: float) -> torch.Tensor:
    moment, lr, beta1, beta2 = torch.zeros_like(weight), 1e-2, 0.9, 0.99
    for gradient in gradients:
        direction = torch.sign(beta1 * moment + (1 - beta1) * gradient)
        weight = weight - lr * (direction + decay * weight)
        moment = beta2 * moment + (1 - beta2) * gradient
    return weight


@pytest.mark.parametrize("size", [5, BLOCK + 7])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_the_paper(size: int, decay: float) -> None:
    chance = torch.Generator().manual_seed(3)
    start = torch.randn(size, generator=chance)
    gradients = [torch.randn(size, generator=chance) for _ in range(4)]
    for gradient in gradients:
        gradient[: size // 2] = 0.0
    parameter = torch.nn.Parameter(start.clone())
    optimizer = Lion([{"params": [parameter]}], lr=1e-2, betas=(0.9, 0.99), weight_decay=decay)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    assert torch.allclose(parameter, by_the_paper(start, gradients, decay=decay), atol=1e-6)
    if not decay:
        assert torch.equal(parameter[: size // 2], start[: size // 2]), "no gradient, no step"


def test_deepspeed_takes_it_for_its_own_and_nothing_is_compiled() -> None:
    optimizer = Lion([{"params": [torch.nn.Parameter(torch.zeros(3))]}])
    assert isinstance(optimizer, DeepSpeedCPULion) and not hasattr(optimizer, "ds_opt_lion")
