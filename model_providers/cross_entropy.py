"""Cross-entropy over a vocabulary cut between tensor ranks, in fp32, blind to the vocabulary's padding.

The backward pass writes the gradient over the logits, its largest tensor, instead of allocating another (megatron-core
does the like).  So logits may be read after the loss, as an evaluation does, but not after its backward pass; a second
backward pass is stopped by autograd's version check.  `chunked_loss.py` does the same without whole logits.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from model_providers.compiled import compiled_on_cuda

CPU_CHUNK = 2**18  # numbers: 1 MB of fp32, which stays in a core's cache from one pass to the next


class VocabularyShare:
    """Which columns of the padded vocabulary a rank holds, and how many of them are real tokens."""

    def __init__(self, vocab_size: int, padded_vocab_size: int, group: Any):
        self.group, self.tp = group, group.size()
        self.width = padded_vocab_size // self.tp
        self.start = group.rank() * self.width
        self.valid = min(max(vocab_size - self.start, 0), self.width)

    def find(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each label's column here, any if it is another rank's, and whether it is ours; in the labels' shape."""
        columns = (labels - self.start).clamp_(0, max(self.valid - 1, 0))
        return columns, (labels >= self.start) & (labels < self.start + self.valid)


class TokenLosses(torch.autograd.Function):
    """[s b v/tp] logits, [s b] labels -> [s b] losses, fp32."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, share: VocabularyShare) -> torch.Tensor:
        columns, own = share.find(labels)  # [s b]
        index = columns.unsqueeze(-1)  # [s b 1]
        log_sum = log_sum_exp(logits[..., : share.valid])  # [s b]
        label_logit = logits_of(logits, index, own, share)
        if share.tp > 1:
            log_sum, label_logit = over_all_ranks(log_sum, label_logit, share.group)
        ctx.save_for_backward(logits, log_sum, index, own)
        ctx.valid = share.valid
        return log_sum - label_logit

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        logits, log_sum, index, own = ctx.saved_tensors
        columns = [x.reshape(-1, 1) for x in (log_sum, grad, index, own)]
        write_gradient(logits.flatten(0, 1), *columns, valid=ctx.valid)
        return logits.detach(), None, None


def logits_of(
    logits: torch.Tensor, index: torch.Tensor, own: torch.Tensor, share: VocabularyShare
) -> torch.Tensor:
    """Each label's logit, zero on other ranks than its own: [... v/tp], [... 1], [...] -> [...], fp32 or wider"""
    if not share.valid:
        return torch.zeros_like(own, dtype=at_least_fp32(logits.dtype))
    return logits.gather(-1, index).squeeze(-1).to(at_least_fp32(logits.dtype)) * own


def write_gradient(
    rows: torch.Tensor,  # [t v/tp], logits, and then their gradients
    log_sum: torch.Tensor,  # [t 1], as the next ones
    grad: torch.Tensor,
    index: torch.Tensor,
    own: torch.Tensor,
    *,
    valid: int,
) -> None:
    """d loss / d logit = (softmax - one-hot) x grad, over the logits; zero for padding"""
    rows[:, valid:] = 0
    if _write_at_once.pays(rows):
        _write_at_once(rows[:, :valid], log_sum, grad, index, own)
        return
    for part, part_log_sum, part_grad, part_index, part_label in in_pieces(
        rows[:, :valid], log_sum, grad, index, -(grad * own)
    ):
        wide = part if part.dtype == grad.dtype else part.to(grad.dtype)
        wide.sub_(part_log_sum).exp_().mul_(part_grad).scatter_add_(-1, part_index, part_label)
        if wide is not part:
            part.copy_(wide)


@compiled_on_cuda
def _write_at_once(
    rows: torch.Tensor, log_sum: torch.Tensor, grad: torch.Tensor, index: torch.Tensor, own: torch.Tensor
) -> None:
    is_label = (torch.arange(rows.size(-1), device=rows.device) == index) & own
    rows.copy_(((rows.to(grad.dtype) - log_sum).exp() - is_label.to(grad.dtype)) * grad)


def log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """[s b v] -> [s b], fp32 or wider"""
    dtype = at_least_fp32(logits.dtype)
    if logits.size(-1) == 0:
        return torch.full(logits.shape[:-1], -torch.inf, device=logits.device, dtype=dtype)
    parts = [_log_sum(part, dtype) for (part,) in in_pieces(logits.flatten(0, -2))]
    return torch.cat(parts).view(logits.shape[:-1])


@compiled_on_cuda
def _log_sum(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.logsumexp(logits.to(dtype), dim=-1)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def in_pieces(rows: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Some rows at a time on the CPU, where memory is slow; all at once on CUDA, where launches are."""
    if rows.size(-1) == 0:
        return
    count = rows.size(0) if rows.is_cuda else max(1, CPU_CHUNK // rows.size(-1))
    yield from zip(*(tensor.split(count) for tensor in (rows, *others)), strict=True)


def over_all_ranks(
    log_sum: torch.Tensor, label_logit: torch.Tensor, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of exponentials add up; the label's logit is zero on all ranks but its own."""
    top = log_sum.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    both = torch.stack((torch.exp(log_sum - top), label_logit))  # [2 s b]
    dist.all_reduce(both, group=group)
    return both[0].log() + top, both[1]
