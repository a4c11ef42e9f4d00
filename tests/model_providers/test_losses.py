"""Cross-entropy is exact, whole or cut between ranks, and does not see padding."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model_providers.building import solo_groups
from model_providers.cross_entropy import VocabularyShare
from model_providers.losses import WeightedLoss
from tests.model_providers.plans import tensor_groups

S, B, VOCAB = 6, 2, 70


def problem(
    padded: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [s b padded], labels [b s], weights [b s]; the padded columns are larger than any real one."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(S, B, padded, generator=generator)
    logits[..., VOCAB:] = 100.0
    labels = torch.randint(0, VOCAB, (B, S), generator=generator)
    labels[0, 0], labels[0, 1] = 0, VOCAB - 1
    return logits.to(dtype), labels, torch.rand(B, S, generator=generator)


def reference(padded: int) -> tuple[float, torch.Tensor]:
    logits, labels, weights = problem(padded)
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact[..., :VOCAB].permute(1, 2, 0), labels, reduction="none")
    loss = (losses * weights.double()).sum()
    loss.backward()
    assert exact.grad is not None
    return loss.item(), exact.grad.float()


@pytest.mark.parametrize("padded", [VOCAB, 128])
def test_loss_and_gradient_are_exact(padded: int) -> None:
    logits, labels, weights = problem(padded)
    logits.requires_grad_()
    loss = WeightedLoss(VocabularyShare(VOCAB, padded, solo_groups().tp))(logits, (labels, weights))
    loss.backward()
    wanted, gradient = reference(padded)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-5, atol=1e-6)


def test_sixteen_bit_logits_are_summed_in_fp32() -> None:
    logits, labels, weights = problem(VOCAB, torch.bfloat16)
    exact = F.cross_entropy(logits.float().permute(1, 2, 0), labels, reduction="none")
    logits.requires_grad_()
    loss = WeightedLoss(VocabularyShare(VOCAB, VOCAB, solo_groups().tp))(logits, (labels, weights))
    loss.backward()
    assert loss.item() == pytest.approx((exact * weights).sum().item(), rel=1e-6)
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_an_impossible_token_gives_a_finite_loss() -> None:
    logits = torch.zeros(1, 1, 4)
    logits[..., 0] = 1e4
    loss = WeightedLoss(VocabularyShare(4, 4, solo_groups().tp))(
        logits, (torch.tensor([[1]]), torch.ones(1, 1))
    )
    assert loss.item() == pytest.approx(1e4)


def on_a_rank(tp: int, padded: int) -> tuple[float, torch.Tensor]:
    group = tensor_groups(tp).tp
    share = VocabularyShare(VOCAB, padded, group)
    logits, labels, weights = problem(padded)
    own = logits[..., share.start : share.start + share.width].clone().requires_grad_()
    loss = WeightedLoss(share)(own, (labels, weights))
    loss.backward()
    assert own.grad is not None
    return loss.item(), own.grad


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("tp", "padded"), [(2, 128), (2, VOCAB), (4, 128)], ids=["2", "2 unpadded", "4, one empty"]
)
def test_a_cut_vocabulary_gives_the_same(ranks: Any, tp: int, padded: int) -> None:
    """With 4 ranks of 32 columns the last holds padding alone."""
    wanted, gradient = reference(padded)
    found = ranks.run(on_a_rank, tp, tp, padded)
    for loss, _ in found:
        assert loss == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(torch.cat([own for _, own in found], dim=-1), gradient, rtol=1e-5, atol=1e-6)


def test_a_further_depth_does_not_look_over_tokens_that_do_not_count() -> None:
    """Depth 2's label at place i is that of i + 2: it counts if those of i and i + 1 do."""
    logits, labels, weights = problem(VOCAB)
    weights[0, 2] = 0.0  # so depth 2 counts neither at places 1 and 2, nor at 0, whose label it is
    loss = WeightedLoss(VocabularyShare(VOCAB, VOCAB, solo_groups().tp), ahead_weight=1.0)
    loss((logits, torch.zeros_like(logits), logits), (labels, weights))
    uniform = torch.log(torch.tensor(float(VOCAB)))
    exact = F.cross_entropy(logits[: S - 2].permute(1, 2, 0), labels[:, 2:], reduction="none")
    counted = weights[:, 2:].clone()
    counted[0, :3] = 0.0
    first = weights[:, 1:].clone()
    first[0, 1:3] = 0.0
    wanted = (uniform * first.sum() + (exact * counted).sum()) / 2
    ahead = loss.take_ahead()
    assert ahead is not None and ahead.item() == pytest.approx(wanted.item(), rel=1e-5)
