"""What a rank's tensors really take in a step, by kind; and what the estimate says, for tests to compare.

Bytes are those of storages, each counted once.  Activations are what autograd has saved, watched by its hooks; the peak
of everything is watched at every operation.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from launch.memory import RankMemory, rank_memory
from launch.scenario import scenario_of
from model_providers import cross_entropy
from model_providers.linears import BF16_INSTRUCTIONS
from pretrain.loop import begin_step
from tests.opened import Opened, opened

Sizes = dict[int, int]  # bytes by address


@dataclass
class Found:
    parameters: int = 0
    gradients: int = 0  # the most at the end of a backward pass
    optimizer: int = 0
    activations: int = 0  # the most at once
    buffers: int = 0  # buckets of gradients
    peak: int = 0  # of everything that this run has made


def measure(raw: dict[str, Any]) -> tuple[Found, RankMemory]:
    """The second step of a run, since the first one makes the optimizer's states."""
    able = dict.fromkeys(BF16_INSTRUCTIONS, True)
    with (
        patch.object(cross_entropy, "CPU_CHUNK", 1 << 40),  # all at once, as on CUDA
        patch.object(torch.cpu, "get_capabilities", lambda: able),  # 16-bit matrices are not widened there
    ):
        return _measure(raw)


def measure_states(raw: dict[str, Any]) -> tuple[int, RankMemory]:
    """Bytes of masters and of an optimizer's states after a step, and what the estimate says."""
    with opened(raw) as here:
        found = Found()
        begin_step(here.run, here.engine, 0)
        here.engine.train_step(here.feed.next_step())
        _count_states(here, found)
        return found.optimizer, rank_memory(scenario_of(here.run), here.groups.place.pp)


def _measure(raw: dict[str, Any]) -> tuple[Found, RankMemory]:
    gc.collect()
    before = set(sizes(all_tensors()))
    with opened(raw) as here:
        found = Found()
        for step in range(2):
            batches = here.feed.next_step()
            begin_step(here.run, here.engine, step)
            if step == 0:
                here.engine.train_step(batches)
                continue
            _count_states(here, found)
            gc.collect()
            everything = Everything(tensor for tensor in all_tensors() if address(tensor) not in before)
            saved = Saved(here.engine.deepspeed.module)
            after_backward = _after_backward(here, lambda: _count_gradients(here, found))
            with saved.watching(), everything, after_backward, _emptied_and_filled(saved, everything):
                here.engine.train_step(batches)
            found.activations, found.peak = saved.peak, everything.peak
        return found, rank_memory(scenario_of(here.run), here.groups.place.pp)


def sizes(tensors: Iterable[Any]) -> Sizes:
    found = {
        address(tensor): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor is not None and tensor.device.type != "meta"
    }
    found.pop(0, None)
    return found


def address(tensor: torch.Tensor) -> int:
    return 0 if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()


def all_tensors() -> list[torch.Tensor]:
    return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]


def _count_states(here: Opened, found: Found) -> None:
    parameters = list(here.engine.deepspeed.module.parameters())
    weights = sizes(parameter.data for parameter in parameters)
    weights |= sizes(getattr(parameter, "ds_tensor", None) for parameter in parameters)
    optimizer = here.engine.deepspeed.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    states = sizes(_tensors(list(inner.state.values())))
    states |= sizes(tensor for group in inner.param_groups for tensor in group["params"])
    states |= sizes(getattr(optimizer, "fp32_partitioned_groups_flat", []))
    found.parameters = sum(weights.values())
    found.optimizer = sum(size for place, size in states.items() if place not in weights)


def _count_gradients(here: Opened, found: Found) -> None:
    parameters = list(here.engine.deepspeed.module.parameters())
    optimizer = here.engine.deepspeed.optimizer
    buckets = {}
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        held = bucket.buffer
        buckets |= sizes(held if isinstance(held, list) else [held])
    kept = sizes(parameter.grad for parameter in parameters)
    kept |= sizes(getattr(parameter, "grad_accum", None) for parameter in parameters)
    for name in (
        "fp32_groups_gradients_flat",
        "averaged_gradients",
        "all_grad_tensors",
        "accumulated_grads_in_cpu",
    ):
        kept |= sizes(_tensors(getattr(optimizer, name, [])))
    kept |= sizes([getattr(optimizer, "grad_partitions_flat_buffer", None)])
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        kept |= sizes(master.grad for master in getattr(optimizer, name, []))
    found.buffers = max(found.buffers, sum(buckets.values()))
    found.gradients = max(found.gradients, sum(size for place, size in kept.items() if place not in buckets))


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        yield from _tensors(list(held.values()))
    elif isinstance(held, list | tuple):
        for one in held:
            yield from _tensors(one)


@contextmanager
def _after_backward(here: Opened, look: Callable[[], None]) -> Iterator[None]:
    timers = here.engine.timers
    plain = timers.phase

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with plain(name):
            yield
        if name == "backward":
            look()

    timers.phase = phase  # type: ignore[method-assign]
    try:
        yield
    finally:
        timers.phase = plain  # type: ignore[method-assign]


@contextmanager
def _emptied_and_filled(*watchers: "Saved | Everything") -> Iterator[None]:
    """Selective recompute empties storages, and fills them again: tell the watchers, whom no operation tells."""
    kind = CheckpointWithoutOutput
    plain = kind.discard_output_and_register_recompute, kind._recompute

    def around(method: Callable[..., None]) -> Callable[..., None]:
        def told(self: Any, argument: Any) -> None:
            outputs = self.outputs or ()
            method(self, argument)
            for output in outputs:
                for watcher in watchers:
                    watcher.resized(output.untyped_storage())

        return told

    kind.discard_output_and_register_recompute, kind._recompute = (around(method) for method in plain)
    try:
        yield
    finally:
        kind.discard_output_and_register_recompute, kind._recompute = plain


class Saved:
    """Bytes that autograd has saved and not yet let go, weights aside."""

    def __init__(self, module: torch.nn.Module):
        self._module, self._now, self.peak = module, 0, 0
        self._holders: dict[int, int] = {}
        self._sizes: dict[int, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield

    def _pack(self, tensor: torch.Tensor) -> "_Kept":
        place, storage = address(tensor), tensor.untyped_storage()
        if tensor.numel() <= 1 or any(address(parameter) == place for parameter in self._module.parameters()):
            return _Kept(tensor, lambda: None)
        key = storage._cdata
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self._sizes[key] = 0
            self.resized(storage)
        return _Kept(tensor, lambda: self._let_go(key))

    def resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if self._holders.get(key):
            self._now += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()
            self.peak = max(self.peak, self._now)

    def _let_go(self, key: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self._now -= self._sizes.pop(key)


class _Kept:
    def __init__(self, tensor: torch.Tensor, let_go: Callable[[], None]):
        self.tensor = tensor
        weakref.finalize(self, let_go)


class Everything(TorchDispatchMode):
    """Every storage from its first operation to its end."""

    def __init__(self, there: Iterable[torch.Tensor]):
        super().__init__()
        self._now, self.peak = 0, 0
        self._known = WeakIdKeyDictionary()
        for tensor in there:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = size = [0]
            self.resized(storage)
            weakref.finalize(storage, self._end, size)

    def resized(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            size = self._known[storage]
            self._now += storage.nbytes() - size[0]
            size[0] = storage.nbytes()
            self.peak = max(self.peak, self._now)

    def _end(self, size: list[int]) -> None:
        self._now -= size[0]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            self._add(tensor)
        return made
