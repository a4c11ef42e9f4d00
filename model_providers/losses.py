"""What is trained on: the tokens' losses, each times its weight, and what further tasks and depths add."""

from typing import Any

import torch
import torch.nn.functional as F

from model_providers.chunked_loss import PendingLogits
from model_providers.cross_entropy import TokenLosses, VocabularyShare

Logits = torch.Tensor | PendingLogits  # [s b v/tp]


class WeightedLoss:
    """(logits [s b v/tp], Targets) -> scalar: the sum of the tokens' losses, each times its weight.

    Logits may be pending: then they are made and let go a chunk of tokens at a time.  Where layers look ahead, logits
    are a tuple, and what comes out is the loss of the next token alone; the other depths' losses add their gradients
    (DeepSeek-V3, arXiv:2412.19437, equations 24 and 25) and are kept to be told.
    """

    def __init__(self, share: VocabularyShare, *, ahead_weight: float = 0.0):
        self.share, self.ahead_weight = share, ahead_weight
        self._ahead: torch.Tensor | None = (
            None  # the mean over depths, summed over the calls since `take_ahead`
        )

    def __call__(self, output: Any, targets: Any) -> torch.Tensor:
        labels, weights = targets  # [b s] each
        if not isinstance(output, tuple):
            return self._weighted(output, labels, weights)
        main, *depths = output
        loss = self._weighted(main, labels, weights)
        further = [self._further(logits, labels, weights, k) for k, logits in enumerate(depths, 1)]
        ahead = torch.stack(further).mean()
        self._ahead = ahead.detach() if self._ahead is None else self._ahead + ahead.detach()
        return AddGradient.apply(loss, self.ahead_weight * ahead)

    def take_ahead(self) -> torch.Tensor | None:
        """The other depths' losses since the last time, summed like the micro-batches' own; None if nobody looks."""
        kept, self._ahead = self._ahead, None
        return kept

    def _further(self, logits: Logits, labels: torch.Tensor, weights: torch.Tensor, k: int) -> torch.Tensor:
        """Depth k's: the label is k further on, with its weight, unless a token that does not count lies between."""
        counted = weights[:, k:]
        for step in range(k):
            counted = counted * (weights[:, step : weights.size(1) - k + step] > 0)
        return self._weighted(logits, F.pad(labels[:, k:], (0, k)), F.pad(counted, (0, k)))

    def _weighted(self, logits: Logits, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (self.token_losses(logits, labels) * weights.t().float()).sum()

    def token_losses(self, output: Logits, labels: torch.Tensor) -> torch.Tensor:
        """[s b], fp32"""
        if isinstance(output, PendingLogits):
            return output.losses(labels.t(), self.share)
        return TokenLosses.apply(output, labels.t(), self.share)


class MaskedLoss(WeightedLoss):
    """The masked tokens' losses, each times its weight, and with a second task the sentences' likewise.

    Targets are labels [b s] and weights [b s], and with a second task labels [b] and weights [b].
    """

    def __call__(self, output: Any, targets: Any) -> torch.Tensor:
        if not isinstance(output, tuple):
            return self._weighted(output, *targets[:2])
        logits, sentences = output  # [s b v/tp], [b 2]
        masked = self._weighted(logits, *targets[:2])
        if len(targets) == 2:
            return masked + 0.0 * sentences.float().sum()  # the head is there, and nothing asks it
        labels, weights = targets[2:]
        return masked + (F.cross_entropy(sentences.float(), labels, reduction="none") * weights).sum()


class AddGradient(torch.autograd.Function):
    """The first loss, with the gradients of both."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return grad, grad
