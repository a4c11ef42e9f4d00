"""Gradients averaged over the copies of the model, in place, and while a pipeline still works.

A chunk that has seen its last micro-batch has its gradients; nobody adds to them any more, but other chunks, and other
stages, are busy for a while.  DeepSpeed 0.19 reduces everything after the last operation; here the sums of finished
chunks are under way until then.  Large gradients go as they are, small ones together.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.engine import DeepSpeedEngine

from pretrain.engine.schedules.ops import Kind, Op, Order

BUCKET_ELEMENTS = 1 << 22  # 16 MB of fp32: well above what latency costs on any link


@dataclass
class Sum:
    """One under way: ``flat`` becomes the sum of what lies in ``bucket``."""

    work: Any
    flat: torch.Tensor
    bucket: list[torch.Tensor]


def start_sums(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup) -> list[Sum]:
    """Begin to sum these over a group; all its ranks start the same ones in the same order."""
    sums = []
    for bucket in buckets(gradients):
        alone = len(bucket) == 1 and bucket[0].is_contiguous()
        flat = bucket[0] if alone else torch.cat([gradient.reshape(-1) for gradient in bucket])
        sums.append(Sum(dist.all_reduce(flat, group=group, async_op=True), flat, bucket))
    return sums


def finish_sums(sums: Sequence[Sum], replicas: int) -> None:
    """Wait, and put a ``replicas``-th of the sums where the gradients were."""
    for one in sums:
        one.work.wait()
        one.flat.div_(replicas)
        if one.flat is not one.bucket[0]:
            parts = one.flat.split([gradient.numel() for gradient in one.bucket])
            for gradient, part in zip(one.bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def average(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup, replicas: int) -> None:
    """In place."""
    if replicas > 1:
        finish_sums(start_sums(gradients, group), replicas)


def is_plain_average(engine: DeepSpeedEngine) -> bool:
    """Whether nothing in the configuration scales gradients on the way."""
    is_mean = engine.gradient_average and engine.postscale_gradients()
    return bool(is_mean) and engine.gradient_predivide_factor() == 1.0


class Averages:
    """Averages under way over the copies of a model.

    ``experts``: the ranks that hold the same experts.  Those have met the tokens of all ``dp`` replicas already, and
    are averaged over as many.
    """

    def __init__(self, dp: dist.ProcessGroup, experts: dist.ProcessGroup | None = None):
        self._dp, self._replicas, self._experts = dp, dist.get_world_size(dp), experts or dp
        self._under_way: list[Sum] = []

    def start(self, gradients: Sequence[torch.Tensor], experts: Sequence[torch.Tensor] = ()) -> None:
        """Begin to average these in place; they must not be touched before `finish`."""
        if self._replicas > 1:
            self._under_way += start_sums(gradients, self._dp) + start_sums(experts, self._experts)

    def finish(self) -> None:
        """Wait, and put the averages where the gradients were."""
        finish_sums(self._under_way, self._replicas)
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
