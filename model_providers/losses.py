"""Cross-entropy over a vocabulary cut between tensor ranks, in fp32, blind to the vocabulary's padding."""

from typing import Any

import torch
import torch.distributed as dist


class VocabularyShare:
    """Which columns of the padded vocabulary a rank holds, and how many of them are real tokens."""

    def __init__(self, vocab_size: int, padded_vocab_size: int, group: Any):
        self.group, self.tp = group, group.size()
        self.width = padded_vocab_size // self.tp
        self.start = group.rank() * self.width
        self.valid = min(max(vocab_size - self.start, 0), self.width)


class TokenLosses(torch.autograd.Function):
    """[s b v/tp] logits, [s b] labels -> [s b] losses, fp32.

    Kept for the backward pass: one fp32 tensor of the logits' shape, which becomes the gradient in place.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, share: VocabularyShare) -> torch.Tensor:
        real = logits[..., : share.valid]
        index = (labels - share.start).clamp_(0, max(share.valid - 1, 0)).unsqueeze(-1)  # [s b 1]
        own = (labels >= share.start) & (labels < share.start + share.valid)  # [s b]
        if share.tp == 1:
            log_probabilities = torch.log_softmax(real, dim=-1, dtype=torch.float32)
            losses = -log_probabilities.gather(-1, index).squeeze(-1)
        else:
            log_probabilities, losses = _parallel_log_softmax(real, index, own, share)
        ctx.save_for_backward(log_probabilities, index, own)
        ctx.logits_like, ctx.share = (logits.shape, logits.dtype), share
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """d loss / d logit = (softmax - one-hot) x grad"""
        log_probabilities, index, own = ctx.saved_tensors
        (shape, dtype), share = ctx.logits_like, ctx.share
        grad = grad.unsqueeze(-1)  # [s b 1]
        grad_real = log_probabilities.exp_().mul_(grad)
        if share.valid:
            grad_real.scatter_add_(-1, index, -(grad * own.unsqueeze(-1)))
        if share.valid == share.width:
            return grad_real.to(dtype), None, None
        padded = grad.new_zeros(shape, dtype=dtype)
        padded[..., : share.valid] = grad_real
        return padded, None, None


def _parallel_log_softmax(
    real: torch.Tensor, index: torch.Tensor, own: torch.Tensor, share: VocabularyShare
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum, sum of exponentials and the label's logit each need one reduction over the tensor ranks."""
    logits = real.to(torch.float32, copy=True)
    if share.valid:
        top = logits.amax(dim=-1)  # [s b]
    else:
        top = torch.full(own.shape, -torch.inf, device=logits.device)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=share.group)
    logits.sub_(top.unsqueeze(-1))
    label_logit = logits.gather(-1, index).squeeze(-1) * own if share.valid else torch.zeros_like(top)
    sums = torch.stack((logits.exp().sum(dim=-1), label_logit))  # [2 s b]
    dist.all_reduce(sums, group=share.group)
    log_sum = sums[0].log()
    return logits.sub_(log_sum.unsqueeze(-1)), log_sum - sums[1]


class WeightedLoss:
    """(logits [s b v/tp], Targets) -> scalar: the sum of the tokens' losses, each times its weight."""

    def __init__(self, share: VocabularyShare):
        self.share = share

    def __call__(self, output: torch.Tensor, targets: Any) -> torch.Tensor:
        labels, weights = targets  # [b s] each
        return (self.token_losses(output, labels) * weights.t().float()).sum()

    def token_losses(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[s b], fp32"""
        return TokenLosses.apply(output, labels.t(), self.share)
