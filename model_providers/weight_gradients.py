"""The half of a backward pass that may wait: weight gradients put aside, and computed when the engine says so.

Zero-bubble schedules (Qi et al. 2023) fill the time in which a pipeline stage would wait with this half.  A linear that
ran under `may_wait` leaves its weight's gradient as work in the open `Store`; everything else (norms, biases of norms,
embeddings) computes its gradients at once, so the split is always right, and as complete as the linears' share.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Accumulate = Callable[[torch.nn.Parameter, torch.Tensor], None]
Work = Callable[[], torch.Tensor]  # computes one gradient


class Store:
    """What one backward pass has put aside."""

    def __init__(self) -> None:
        self._waiting: list[tuple[torch.nn.Parameter, Work]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, parameter: torch.nn.Parameter, work: Work) -> None:
        self._waiting.append((parameter, work))

    @torch.no_grad()
    def compute(self, accumulate: Accumulate) -> None:
        """Compute what waits, in the order in which it came, and let go of it."""
        waiting, self._waiting = self._waiting, []
        for parameter, work in waiting:
            accumulate(parameter, work())


class _State:
    may_wait = False
    store: Store | None = None


@contextmanager
def may_wait() -> Iterator[None]:
    """Linears that run inside are able to put their weights' gradients aside later."""
    before, _State.may_wait = _State.may_wait, True
    try:
        yield
    finally:
        _State.may_wait = before


@contextmanager
def put_aside() -> Iterator[Store]:
    """A backward pass inside computes gradients of inputs, and leaves those of such linears' weights in the store."""
    assert _State.store is None, "a store is open already"
    _State.store = store = Store()
    try:
        yield store
    finally:
        _State.store = None


def can_wait() -> bool:
    return _State.may_wait


def open_store() -> Store | None:
    return _State.store
