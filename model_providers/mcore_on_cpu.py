"""The one table of functions that are replaced in megatron-core.

Subclassing cannot do this: its linears and mappings name these functions directly.  Two kinds of row.
``cpu``: what allocates on ``torch.cuda.current_device()`` gets a twin that allocates beside its input; on CUDA
these rows are left alone.  ``everywhere``: the mend of an upstream fault.  Each row carries the SHA-256 of the
source that it was written against, so another megatron-core stops here with one line.  (One thing more is put
into megatron-core, through its own global: the tracker of random_streams.py.)
"""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from model_providers.errors import ModelError
from model_providers.random_streams import open_tracker

TRIED_VERSIONS = ("0.16.1",)
SMALL = 2**15  # numbers; measured with 2 and 4 ranks on two cores


class Replacement(NamedTuple):
    owner: Any  # a module or a class of megatron-core
    name: str
    new: Callable[..., Any]
    source_sha256: str
    where: Literal["cpu", "everywhere"]
    why: str

    @property
    def target(self) -> str:
        return f"{self.owner.__name__}.{self.name}".removeprefix("megatron.core.")


def get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def checkpoint_without_output_init(self: Any, fp8: Any = False) -> None:
    """Upstream asks ``fp8 is not None`` of a default of False, and so calls Transformer Engine, there or not."""
    self.fp8 = bool(fp8)
    self.run_function = self.fwd_cpu_rng_state = self.fwd_cuda_rng_state = None
    self.fwd_cuda_rng_state_tracker = self.ctx = self.outputs = None


def reduce(input_: torch.Tensor, group: Any) -> torch.Tensor:
    """Upstream reduces ``input_.contiguous()`` and returns ``input_``: for a strided input the sum is lost.

    The group is None in a single process that never initialised torch.distributed.
    """
    if group is None or group.size() == 1:
        return input_
    total = input_.contiguous()
    if _is_small(total):
        return torch.stack(_all_parts(total, group)).sum(dim=0)
    dist.all_reduce(total, group=group)
    return total


def gather_along_last_dim(input_: torch.Tensor, group: Any) -> torch.Tensor:
    """[... n/tp] -> [... n]"""
    if group.size() == 1:
        return input_
    return torch.cat(_all_parts(input_.contiguous(), group), dim=-1)


def gather_along_first_dim(
    input_: torch.Tensor,
    group: Any,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """[s/tp ...] -> [s ...]; or with rank i's share ``output_split_sizes[i]`` long, which gloo cannot do by itself"""
    if group.size() == 1:
        return input_
    if output_split_sizes is not None:
        longest = max(output_split_sizes)
        padded = input_.new_zeros([longest, *input_.shape[1:]])
        padded[: input_.size(0)] = input_
        parts = _all_parts(padded, group)
        return torch.cat([part[:length] for part, length in zip(parts, output_split_sizes, strict=True)])
    output = input_.new_empty([input_.size(0) * group.size(), *input_.shape[1:]])
    dist.all_gather_into_tensor(output, input_.contiguous(), group=group)
    return output


def reduce_scatter_along_first_dim(
    input_: torch.Tensor,
    group: Any,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """[s ...] -> [s/tp ...], or this rank's ``input_split_sizes[rank]`` of them, summed over the group"""
    if group.size() == 1:
        return input_
    if input_split_sizes is not None:
        return reduce(input_.clone(), group).split(list(input_split_sizes))[group.rank()].contiguous()
    assert input_.size(0) % group.size() == 0, (input_.shape, group.size())
    if _is_small(input_):
        return reduce(input_, group).chunk(group.size())[group.rank()]
    output = input_.new_empty([input_.size(0) // group.size(), *input_.shape[1:]])
    dist.reduce_scatter_tensor(output, input_.contiguous(), group=group)
    return output


def all_to_all(
    ctx: Any, group: Any, input: torch.Tensor, output_split_sizes: Any, input_split_sizes: Any
) -> torch.Tensor:
    """Rank i's piece of ``input_split_sizes[i]`` rows goes to rank i; equal pieces without sizes"""
    ctx.group, ctx.output_split_sizes, ctx.input_split_sizes = group, output_split_sizes, input_split_sizes
    if group.size() == 1:
        return input
    received, sent = (
        None if sizes is None else [int(size) for size in sizes]
        for sizes in (output_split_sizes, input_split_sizes)
    )
    input = input.contiguous()
    output = (
        torch.empty_like(input) if received is None else input.new_empty([sum(received), *input.shape[1:]])
    )
    dist.all_to_all_single(output, input, output_split_sizes=received, input_split_sizes=sent, group=group)
    return output


def _is_small(tensor: torch.Tensor) -> bool:
    """Whether gloo sums faster by a gather: its all-reduce of a few numbers takes 1 to 2 ms, its gather 0.4."""
    return tensor.is_cpu and tensor.numel() <= SMALL


def _all_parts(input_: torch.Tensor, group: Any) -> list[torch.Tensor]:
    """Every rank's tensor, in rank order; contiguous."""
    parts = [torch.empty_like(input_) for _ in range(group.size())]
    dist.all_gather(parts, input_, group=group)
    return parts


TABLE: tuple[Replacement, ...] = (
    Replacement(
        mcore_random,
        "_get_cuda_rng_state",
        get_rng_state,
        "aa26caaa069c5c4feff0f9f4e69f0f2ab6d6fc7940f71c3a6d0fe9303447d3dc",
        "cpu",
        "every recompute saves the device's random state",
    ),
    Replacement(
        mcore_random,
        "_set_cuda_rng_state",
        set_rng_state,
        "b179c9d95438b61c1d9b58e8e13cc6534f2ae2f870d991c42438de53829ed398",
        "cpu",
        "without CUDA it queues a closure for ever at each recompute",
    ),
    Replacement(
        mcore_random.CheckpointWithoutOutput,
        "__init__",
        checkpoint_without_output_init,
        "72036565b77136f2579f36e1f34fcc29706746f7515fa9711bf73eb78b1c5f07",
        "everywhere",
        "selective recompute of norms needs Transformer Engine's FP8 without having it",
    ),
    Replacement(
        mappings,
        "_reduce",
        reduce,
        "d8dac1bff328972c803fdc988c8ecc13a796598a15a251ee93448133ec72e1ac",
        "everywhere",
        "the sum over the tensor group of a strided tensor was lost",
    ),
    Replacement(
        mappings,
        "_gather_along_last_dim",
        gather_along_last_dim,
        "78507d5543935a72907e72b34fdb3eec3900eb0837609d620c66a6968c87ef6b",
        "cpu",
        "fewer key-value heads than tensor ranks",
    ),
    Replacement(
        mappings,
        "_gather_along_first_dim",
        gather_along_first_dim,
        "44633fe36d60a51f5e5b3d4c6e65037ef8cb66ae1edd80046f209f3339b12e46",
        "cpu",
        "sequence parallelism",
    ),
    Replacement(
        mappings,
        "_reduce_scatter_along_first_dim",
        reduce_scatter_along_first_dim,
        "7322068fab71d319dd9d5f3a55a84f790e935cc9fc0130f8f8fb5bee443a78fa",
        "cpu",
        "sequence parallelism",
    ),
    Replacement(
        mappings._AllToAll,
        "forward",
        all_to_all,
        "a4e3e4984091d25faa93564e96562a4390734744e442646541d478c933025ab1",
        "cpu",
        "tokens to experts on other ranks",
    ),
)

# What megatron-core would fill with something of CUDA's when it finds None: (owner, name, what stands there on a CPU).
PLACEHOLDERS: tuple[tuple[Any, str, Any], ...] = (
    (MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", "no stream"),
)


_upstream: dict[str, Any] = {}  # what was replaced, by target


def install(device: str, table: tuple[Replacement, ...] = TABLE) -> None:
    """Put the rows for ``device`` ("cpu" or "cuda") in place, and only them; calling again changes nothing.

    For "cuda" there has to be CUDA.
    """
    for row in table:
        if row.where == "everywhere" or device == "cpu":
            _replace(row)
        elif (original := _upstream.get(row.target)) is not None:  # the same process ran something on the CPU
            setattr(row.owner, row.name, original)
    for owner, name, stand_in in PLACEHOLDERS:
        here = getattr(owner, name)
        if device == "cpu" and here is None:
            setattr(owner, name, stand_in)
        elif device != "cpu" and here == stand_in:
            setattr(owner, name, None)
    open_tracker(device)


def _replace(row: Replacement) -> None:
    current = getattr(row.owner, row.name, None)
    if current is row.new:
        return
    if current is None or source_sha256(current) != row.source_sha256:
        raise ModelError(
            f"megatron-core=={megatron.core.__version__}: {row.target} is not the function that is replaced "
            f"here; tried with {', '.join(TRIED_VERSIONS)}: install one of these"
        )
    _upstream[row.target] = inspect.getattr_static(row.owner, row.name)
    setattr(row.owner, row.name, staticmethod(row.new) if _is_autograd_function(row.owner) else row.new)


def source_sha256(function: Callable[..., Any]) -> str:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()


def _is_autograd_function(owner: Any) -> bool:
    return inspect.isclass(owner) and issubclass(owner, torch.autograd.Function)
