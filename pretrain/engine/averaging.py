"""Gradients averaged over the copies of the model while the pipeline still works.

A chunk that has seen its last micro-batch has its gradients; nobody adds to them any more, but other chunks, and other
stages, are busy for a while.  DeepSpeed 0.19 reduces everything after the last operation; here the sums of finished
chunks are under way until then.  Large gradients go as they are, small ones together.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param

from pretrain.engine.schedules.ops import Kind, Op, Order

BUCKET_ELEMENTS = 1 << 22  # 16 MB of fp32: well above what latency costs on any link


class Averages:
    """Sums under way over groups of ranks, which all start the same ones in the same order.

    ``experts``: the ranks that hold the same experts.  Those have met the tokens of all ``dp`` replicas already, and
    are averaged over as many.
    """

    def __init__(self, dp: dist.ProcessGroup, experts: dist.ProcessGroup | None = None):
        self._dp, self._replicas, self._experts = dp, dist.get_world_size(dp), experts or dp
        self._under_way: list[tuple[Any, torch.Tensor, list[torch.Tensor]]] = []

    def start(self, gradients: Sequence[torch.Tensor], experts: Sequence[torch.Tensor] = ()) -> None:
        """Begin to average these in place; they must not be touched before `finish`."""
        if self._replicas == 1:
            return
        for kind, group in ((gradients, self._dp), (experts, self._experts)):
            for bucket in buckets(kind):
                alone = len(bucket) == 1 and bucket[0].is_contiguous()
                flat = bucket[0] if alone else torch.cat([gradient.reshape(-1) for gradient in bucket])
                work = dist.all_reduce(flat, group=group, async_op=True)
                self._under_way.append((work, flat, bucket))

    def finish(self) -> None:
        """Wait, and put the averages where the gradients were."""
        for work, flat, bucket in self._under_way:
            work.wait()
            flat.div_(self._replicas)
            if flat is not bucket[0]:
                parts = flat.split([gradient.numel() for gradient in bucket])
                for gradient, part in zip(bucket, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))
        self._under_way = []


class FinishedChunks:
    """Starts each chunk's averages when its last gradient is there."""

    def __init__(
        self,
        chunks: Sequence[Sequence[torch.nn.Parameter]],
        gradient_of: Callable[[torch.nn.Parameter], torch.Tensor],
        averages: Averages,
    ):
        self._parameters = {id(parameter): parameter for chunk in chunks for parameter in chunk}
        self._chunks = [[id(parameter) for parameter in chunk] for chunk in chunks]
        self._gradient_of, self.averages = gradient_of, averages
        self._left: Counter[int] = Counter()  # operations by chunk that add to its gradients
        self._holders: Counter[int] = Counter()  # unfinished chunks by parameter: a tied one may lie in two

    def begin(self, order: Order) -> None:
        """A step in this rank's order."""
        self._left = Counter(op.chunk for op in order if op.kind != Kind.FORWARD)
        self._holders = Counter(parameter for chunk in self._chunks for parameter in chunk)

    def count(self, op: Op) -> bool:
        """An operation is done; whether it was its chunk's last, and averages were started."""
        if op.kind == Kind.FORWARD:
            return False
        self._left[op.chunk] -= 1
        if self._left[op.chunk]:
            return False
        here = self._chunks[op.chunk]
        self._holders.subtract(here)
        whole = [self._parameters[key] for key in dict.fromkeys(here) if not self._holders[key]]
        dense: list[torch.Tensor] = []
        experts: list[torch.Tensor] = []
        for parameter in whole:
            (experts if is_moe_param(parameter) else dense).append(self._gradient_of(parameter))
        self.averages.start(dense, experts)
        return True


def buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of one number format and at most `BUCKET_ELEMENTS`; a larger gradient is alone."""
    bucket: list[torch.Tensor] = []
    elements = 0
    for gradient in gradients:
        is_full = elements + gradient.numel() > BUCKET_ELEMENTS
        if bucket and (is_full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, elements = [], 0
        bucket.append(gradient)
        elements += gradient.numel()
    if bucket:
        yield bucket
