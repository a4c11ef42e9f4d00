"""The corner that is taken for the worst is the worst."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.sharpness import sharpness, worst_losses

EPSILON = 0.05


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def test_no_point_of_the_box_is_worse_and_ascent_comes_there() -> None:
    chance = torch.Generator().manual_seed(5)
    logits, labels = torch.randn(3, 2, 7, generator=chance) * 3, torch.randint(0, 7, (3, 2), generator=chance)
    worst = worst_losses(logits, labels, epsilon=EPSILON)
    reach = EPSILON * (logits.abs() + 1)
    for _ in range(200):
        inside = logits + reach * (2 * torch.rand(logits.shape, generator=chance) - 1)
        assert torch.all(loss_of(inside, labels) <= worst)
    moved = logits.clone().requires_grad_()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(loss_of(moved, labels).sum(), moved)
        stepped = moved.detach() + reach * gradient.sign()
        moved = torch.minimum(torch.maximum(stepped, logits - reach), logits + reach).requires_grad_()
    torch.testing.assert_close(loss_of(moved.detach(), labels), worst)


def test_it_is_a_share_of_one_and_the_loss() -> None:
    assert sharpness(1.0, 1.1) == pytest.approx(5.0)
