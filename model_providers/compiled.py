"""Chains of elementwise operations as one kernel of torch.compile, where that pays: on large tensors on CUDA.

Eager torch reads and writes an activation once for each operation.  What is compiled here says itself whether its
kernels may round otherwise than eager ones; `fp8/quantised.py` may not.  TORCHDYNAMO_DISABLE=1 is torch's own way out.
"""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

logger = logging.getLogger(__name__)

LARGE = (
    2**20
)  # numbers: with fewer, launches take the time, and prompts of all lengths would each be compiled
SHAPES = 64  # that one function is compiled for, before torch goes on eagerly; its own limit is 8

P = ParamSpec("P")
R = TypeVar("R")


def compiled_on_cuda(
    function: Callable[Concatenate[torch.Tensor, P], R],
) -> Callable[Concatenate[torch.Tensor, P], R]:
    """``function``, compiled for each shape of its arguments where its first one is large and on CUDA."""
    made: list[Callable[..., Any]] = []

    @wraps(function)
    def either(x: torch.Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if not pays(x):
            return function(x, *args, **kwargs)
        if not made:
            made.append(_compiled(function))
        return made[0](x, *args, **kwargs)

    return either


def pays(x: torch.Tensor) -> bool:
    """Not where somebody else compiles already."""
    return x.is_cuda and x.numel() >= LARGE and not torch.compiler.is_compiling()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Eager, and told once, where torch finds no compiler."""
    import torch._dynamo as dynamo  # takes seconds, so only where it is used

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, SHAPES)
    compiled = torch.compile(function, dynamic=False)
    state = {"works": True}

    @wraps(function)
    def attempted(*args: Any, **kwargs: Any) -> Any:
        if state["works"]:
            try:
                return compiled(*args, **kwargs)
            except dynamo.exc.TorchDynamoException as error:
                state["works"] = False
                reason = " ".join(str(error).splitlines()[:2])
                logger.warning("%s runs without torch.compile, and slower: %s", function.__name__, reason)
        return function(*args, **kwargs)

    return attempted
