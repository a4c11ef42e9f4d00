"""Cross-entropy over a vocabulary cut between tensor ranks, in fp32, blind to the vocabulary's padding.

The backward pass writes the gradient over the logits, its largest tensor, instead of allocating another (megatron-core
does the like).  So logits may be read after the loss, as an evaluation does, but not after its backward pass; a second
backward pass is stopped by autograd's version check.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

CPU_CHUNK = 2**18  # numbers: 1 MB of fp32, which stays in a core's cache from one pass to the next


class VocabularyShare:
    """Which columns of the padded vocabulary a rank holds, and how many of them are real tokens."""

    def __init__(self, vocab_size: int, padded_vocab_size: int, group: Any):
        self.group, self.tp = group, group.size()
        self.width = padded_vocab_size // self.tp
        self.start = group.rank() * self.width
        self.valid = min(max(vocab_size - self.start, 0), self.width)


class TokenLosses(torch.autograd.Function):
    """[s b v/tp] logits, [s b] labels -> [s b] losses, fp32."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, share: VocabularyShare) -> torch.Tensor:
        real = logits[..., : share.valid]
        index = (labels - share.start).clamp_(0, max(share.valid - 1, 0)).unsqueeze(-1)  # [s b 1]
        own = (labels >= share.start) & (labels < share.start + share.valid)  # [s b]
        log_sum = log_sum_exp(real)  # [s b]
        label_logit = (
            real.gather(-1, index).squeeze(-1).float() * own if share.valid else torch.zeros_like(log_sum)
        )
        if share.tp > 1:
            log_sum, label_logit = _over_all_ranks(log_sum, label_logit, share.group)
        ctx.save_for_backward(logits, log_sum, index, own)
        ctx.valid = share.valid
        return log_sum - label_logit

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """d loss / d logit = (softmax - one-hot) x grad; zero for padding"""
        logits, log_sum, index, own = ctx.saved_tensors
        logits[..., ctx.valid :] = 0
        rows = logits[..., : ctx.valid].flatten(0, 1)  # [s*b v/tp]
        columns = (x.reshape(-1, 1) for x in (log_sum, grad, index, -(grad * own)))
        for part, part_log_sum, part_grad, part_index, part_label in _in_chunks(rows, *columns):
            wide = part if part.dtype == grad.dtype else part.to(grad.dtype)
            wide.sub_(part_log_sum).exp_().mul_(part_grad).scatter_add_(-1, part_index, part_label)
            if wide is not part:
                part.copy_(wide)
        return logits.detach(), None, None


def log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """[s b v] -> [s b], fp32"""
    if logits.size(-1) == 0:
        return torch.full(logits.shape[:-1], -torch.inf, device=logits.device)
    parts = [torch.logsumexp(part.float(), dim=-1) for (part,) in _in_chunks(logits.flatten(0, 1))]
    return torch.cat(parts).view(logits.shape[:-1])


def _in_chunks(rows: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Some rows at a time on the CPU, where memory is slow; all at once on CUDA, where launches are."""
    if rows.size(-1) == 0:
        return
    count = rows.size(0) if rows.is_cuda else max(1, CPU_CHUNK // rows.size(-1))
    yield from zip(*(tensor.split(count) for tensor in (rows, *others)), strict=True)


def _over_all_ranks(
    log_sum: torch.Tensor, label_logit: torch.Tensor, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of exponentials add up; the label's logit is zero on all ranks but its own."""
    top = log_sum.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    both = torch.stack((torch.exp(log_sum - top), label_logit))  # [2 s b]
    dist.all_reduce(both, group=group)
    return both[0].log() + top, both[1]


class WeightedLoss:
    """(logits [s b v/tp], Targets) -> scalar: the sum of the tokens' losses, each times its weight.

    Where layers look ahead, logits are a tuple, and what comes out is the loss of the next token alone; the other
    depths' losses add their gradients (DeepSeek-V3, arXiv:2412.19437, equations 24 and 25) and are kept to be told.
    """

    def __init__(self, share: VocabularyShare, *, ahead_weight: float = 0.0):
        self.share, self.ahead_weight = share, ahead_weight
        self._ahead: torch.Tensor | None = (
            None  # the mean over depths, summed over the calls since `take_ahead`
        )

    def __call__(self, output: Any, targets: Any) -> torch.Tensor:
        labels, weights = targets  # [b s] each
        if isinstance(output, torch.Tensor):
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

    def _further(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, k: int
    ) -> torch.Tensor:
        """Depth k's: the label is k further on, with its weight, unless a token that does not count lies between."""
        counted = weights[:, k:]
        for step in range(k):
            counted = counted * (weights[:, step : weights.size(1) - k + step] > 0)
        return self._weighted(logits, F.pad(labels[:, k:], (0, k)), F.pad(counted, (0, k)))

    def _weighted(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (self.token_losses(logits, labels) * weights.t().float()).sum()

    def token_losses(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[s b], fp32"""
        return TokenLosses.apply(output, labels.t(), self.share)


class MaskedLoss(WeightedLoss):
    """The masked tokens' losses, each times its weight, and with a second task the sentences' likewise.

    Targets are labels [b s] and weights [b s], and with a second task labels [b] and weights [b].
    """

    def __call__(self, output: Any, targets: Any) -> torch.Tensor:
        if isinstance(output, torch.Tensor):
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
