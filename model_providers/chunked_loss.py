"""The loss without the logits: the head's product and the cross-entropy, a chunk of tokens at a time.

Forward keeps what goes into the head and one number a token, the log-sum-exp; backward makes each chunk's logits once
more, turns them into their gradient where they lie, and multiplies it into both gradients while it is there.  So the
largest tensor with an axis of words is one chunk's, whatever the sequence.  The price is one more product of the head,
four in place of three.  Gradients made in the forward pass (as in Liger Kernel, arXiv:2410.10989, and torchtitan) need
no fourth, but a gradient as large as the weight for every micro-batch under way, and the loss's scale beforehand,
without which fp16 loses small gradients.  The statistics of each token are Cut Cross-Entropy's (Wijmans et al. 2024,
arXiv:2411.09009, section 4), whose filter of small gradients is left out: here they are exact.

The weight's gradient does not wait for a pipeline's idle moments: waiting it would cost a fifth product.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from model_providers.cross_entropy import (
    VocabularyShare,
    at_least_fp32,
    log_sum_exp,
    logits_of,
    over_all_ranks,
    write_gradient,
)
from model_providers.linears import cpu_multiplies_bf16
from model_providers.loss_chunks import tokens_of_a_chunk
from model_providers.mcore_on_cpu import gather_along_first_dim, reduce, reduce_scatter_along_first_dim


@dataclass(frozen=True)
class HeadProduct:
    """How a head multiplies: in chunks of tokens, and under sequence parallelism from each rank's share of them."""

    chunk_tokens: int
    sequence_parallel: bool


@dataclass(frozen=True)
class PendingLogits:
    """Logits that nobody has made: [s b v/tp], of hidden [s b h] (under sequence parallelism [s/tp b h])."""

    hidden: torch.Tensor
    weight: torch.Tensor  # [v/tp h]
    product: HeadProduct
    bias: torch.Tensor | None = None  # [v/tp]

    def losses(self, labels: torch.Tensor, share: VocabularyShare) -> torch.Tensor:
        """[s b] -> [s b], fp32"""
        return ChunkedLosses.apply(self.hidden, self.weight, self.bias, labels, share, self.product)


class ChunkedLosses(torch.autograd.Function):
    """Hidden [s b h], weight [v/tp h], bias [v/tp], labels [s b] -> losses [s b], fp32 (of float64: float64)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        share: VocabularyShare,
        product: HeadProduct,
    ) -> torch.Tensor:
        whole = _whole(hidden, share, product)
        multiply = _Multiply(weight, bias)
        found = []
        for rows, columns, own in _chunks(product, whole.flatten(0, 1), *_columns(share, labels)):
            logits = multiply(rows)
            found.append(
                (log_sum_exp(logits[:, : share.valid]), logits_of(logits, columns, own.squeeze(-1), share))
            )
            del logits  # before the next chunk's are made
        log_sum, label_logit = (torch.cat(parts).view(labels.shape) for parts in zip(*found, strict=True))
        if share.tp > 1:
            log_sum, label_logit = over_all_ranks(log_sum, label_logit, share.group)
        ctx.save_for_backward(hidden, weight, bias, labels, log_sum)
        ctx.share, ctx.product = share, product
        return log_sum - label_logit

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, labels, log_sum = ctx.saved_tensors
        share, product = ctx.share, ctx.product
        rows = _whole(hidden, share, product).flatten(0, 1)
        multiply = _Multiply(weight, bias)
        sums = _Gradients(rows, weight, bias, ctx.needs_input_grad[:3])
        parts = (log_sum.reshape(-1, 1), grad.reshape(-1, 1), *_columns(share, labels))
        start = 0
        for part, *statistics in _chunks(product, rows, *parts):
            logits = multiply(part)
            write_gradient(logits, *statistics, valid=share.valid)
            sums.add(start, logits, part, multiply)
            start += len(part)
            del logits
        grad_hidden = sums.hidden
        if grad_hidden is not None:
            grad_hidden = _summed(grad_hidden.view(-1, *hidden.shape[1:]), share, product)
        return grad_hidden, *sums.of_parameters(), None, None, None


class _Multiply:
    """[t h] -> logits [t v/tp], in the weight's number format."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        is_wide = weight.is_cpu and weight.dtype.itemsize == 2 and not cpu_multiplies_bf16()
        self.bias, self.dtype = bias, weight.dtype
        self.weight = weight.float() if is_wide else weight  # linears.py says why

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        logits = (rows.to(self.weight.dtype) @ self.weight.t()).to(self.dtype)
        return logits if self.bias is None else logits.add_(self.bias)

    def back(self, grad: torch.Tensor) -> torch.Tensor:
        """[t v/tp] -> [t h]"""
        return grad.to(self.weight.dtype) @ self.weight


class _Gradients:
    """What the chunks add up to: of hidden [t h], this rank's part of a sum over tp; of the parameters, in fp32."""

    def __init__(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needed: tuple[bool, ...]
    ):
        self.dtype, wide = weight.dtype, at_least_fp32(weight.dtype)
        self.hidden = torch.empty_like(rows) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None

    def add(self, start: int, grad: torch.Tensor, rows: torch.Tensor, multiply: _Multiply) -> None:
        if self.hidden is not None:
            self.hidden[start : start + len(rows)] = multiply.back(grad)
        if self.weight is not None:
            add_product(self.weight, grad.t(), rows)
        if self.bias is not None:
            self.bias += grad.sum(dim=0, dtype=self.bias.dtype)

    def of_parameters(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        weight, self.weight = self.weight, None
        return (
            None if weight is None else weight.to(self.dtype),
            None if self.bias is None else self.bias.to(self.dtype),
        )


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total`` [n h] in fp32 plus [n t] x [t h], without rounding the product to 16 bit first."""
    if left.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _chunks(product: HeadProduct, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    count = tokens_of_a_chunk(product.chunk_tokens, len(tensors[0]))
    return zip(*(tensor.split(count) for tensor in tensors), strict=True)


def _columns(share: VocabularyShare, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[s b] -> [t 1] each"""
    columns, own = share.find(labels.reshape(-1, 1))
    return columns, own


def _whole(hidden: torch.Tensor, share: VocabularyShare, product: HeadProduct) -> torch.Tensor:
    return gather_along_first_dim(hidden, share.group) if product.sequence_parallel else hidden


def _summed(grad: torch.Tensor, share: VocabularyShare, product: HeadProduct) -> torch.Tensor:
    if product.sequence_parallel:
        return reduce_scatter_along_first_dim(grad, share.group)
    return reduce(grad, share.group) if share.tp > 1 else grad
