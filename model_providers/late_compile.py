"""Functions of megatron-core and DeepSpeed, compiled when they are first called and not when they are imported.

Both hand some to torch.compile as they are imported, which imports all of torch's compiler: half of the time that a
rank needs to start (`benchmarks/startup.py`), for functions that few runs call, and on a CPU none.  Import this before
the first import of megatron-core; later nothing is lost but that time.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar
from unittest.mock import patch

import torch

P = ParamSpec("P")
R = TypeVar("R")

_compile = torch.compile


def compile_later(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compile` at the first call; inside another compiled function, as torch does it, a part of that."""
    compiled: list[Callable[P, R]] = []

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(_compile(function))
        return compiled[0](*args, **kwargs)

    return call


@contextlib.contextmanager
def hidden(name: str) -> Iterator[None]:
    """A module that is not imported yet is not found meanwhile."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


TENSORBOARD = "torch.utils.tensorboard"  # megatron-core's timers take it if it is there; ours do not use them

# The first keeps what it finds, for all of megatron-core that comes after it.
DECORATING = ("megatron.core.jit", "deepspeed.runtime.zero.muon.original_muon")

with patch.object(torch, "compile", compile_later), hidden(TENSORBOARD):
    for name in DECORATING:
        with contextlib.suppress(ImportError):  # another version has other names
            importlib.import_module(name)
