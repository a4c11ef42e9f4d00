"""Chains of elementwise operations as one kernel of torch.compile, where that pays: on large tensors on CUDA.

Eager torch reads and writes an activation once for each operation.  What is compiled here says itself whether its
kernels may round otherwise than eager ones; `fp8/quantised.py` may not.  TORCHDYNAMO_DISABLE=1 is torch's own way out.
"""

import logging
import os
from collections.abc import Callable
from functools import update_wrapper
from typing import Concatenate, Generic, ParamSpec, TypeVar

import torch

logger = logging.getLogger(__name__)

# Numbers: with fewer, launches take the time, and prompts of all lengths would each be compiled.
LARGE = 2**23
# That one function is compiled for, before torch goes on eagerly; its own limit is 8.
SHAPES = 64

P = ParamSpec("P")
R = TypeVar("R")


class OnCuda(Generic[P, R]):
    """A function that is compiled for each shape of its arguments where its first one is large and on CUDA."""

    def __init__(self, function: Callable[Concatenate[torch.Tensor, P], R]):
        self.function, self.works = function, True
        self._compiled: Callable[..., R] | None = None
        update_wrapper(self, function)

    def pays(self, x: torch.Tensor) -> bool:
        """Whether it will be compiled: else who has a faster way in eager torch goes that."""
        return self.works and pays(x)

    def __call__(self, x: torch.Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.pays(x):
            return self.function(x, *args, **kwargs)
        import torch._dynamo as dynamo  # takes seconds, so only where it is used

        if self._compiled is None:
            self._compiled = torch.compile(self.function, dynamic=False)
        if dynamo.config.recompile_limit < SHAPES:  # each thread has its own, that of backward passes too
            dynamo.config.recompile_limit = SHAPES
        try:
            return self._compiled(x, *args, **kwargs)
        except dynamo.exc.TorchDynamoException as error:
            self.works = False
            reason = " ".join(str(error).splitlines()[:2])
            logger.warning("%s runs without torch.compile, and slower: %s", self.function.__name__, reason)
            return self.function(x, *args, **kwargs)


def compiled_on_cuda(function: Callable[Concatenate[torch.Tensor, P], R]) -> OnCuda[P, R]:
    """For a chain of operations, tensor first."""
    return OnCuda(function)


def pays(x: torch.Tensor) -> bool:
    """Not where somebody else compiles already."""
    is_large = x.is_cuda and x.numel() >= LARGE
    return is_large and not torch.compiler.is_compiling() and os.environ.get("TORCHDYNAMO_DISABLE") != "1"
