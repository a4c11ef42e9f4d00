"""What the backward pass needs of the layers waits in the host's memory instead of the device's.

Autograd's hooks for saved tensors (torch.autograd.graph.saved_tensors_hooks) hand over whatever a group of layers
keeps: activations, or under full recompute the group's input alone.  Weights are not offloaded: what is handed over is
told to be a weight by where it lies, and a reference stays, so that ZeRO-3 may let the gathered weight go and gather
it again.  Storages are moved whole and once, however many views of them are saved.

On CUDA copies out and copies in have a stream each, and pinned memory of torch's caching host allocator, which uses it
again and rounds it up to a power of two.  The two newest groups' tensors are still on the device when their copies may
not be done, and are used from there if they are needed so soon; the backward pass of a group fetches the group before
it.  On a CPU the same is done without streams, by copies within one memory: for tests, not for use.

megatron-core has such a thing (megatron/core/pipeline_parallel/fine_grained_activation_offload.py) whose manager is one
global of the process, made for its own schedules and CUDA; hence this one.
"""

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

NEWEST = 2  # groups whose tensors stay on the device until their copies are surely done


class Offload:
    """One rank's; a `Group` of layers registers what its forward pass keeps."""

    def __init__(self, device: torch.device, *, above_bytes: int):
        self.device, self.above_bytes = device, above_bytes
        self.lanes = CudaLanes(device) if device.type == "cuda" else Lanes()
        self.host_bytes = self.peak_host_bytes = 0
        self._newest: deque[Group] = deque()
        self._by_storage: weakref.WeakValueDictionary[tuple[int, int], Kept] = weakref.WeakValueDictionary()

    def group(
        self, modules: Iterable[nn.Module], *, before: "Group | None", inputs: Iterable[torch.Tensor] = ()
    ) -> "Group":
        """For ``with``, around a forward pass; ``before`` is the group whose output it takes.

        ``inputs`` that nothing on this rank has made, as a pipeline receives them, stay: others hold them anyway.
        """
        held = [tensor for tensor in inputs if tensor.is_leaf]
        for module in modules:
            held += [*module.parameters(), *module.buffers()]
        return Group(self, held, before)

    def open(self, group: "Group") -> None:
        """The oldest of the newest groups lets its tensors go from the device; the stream waits for their copies."""
        while len(self._newest) >= NEWEST:
            self._newest.popleft().leave_device()
        self._newest.append(group)

    def settle(self, *, but: "Group") -> None:
        """All other groups let go: a backward pass has come to tensors that must be fetched."""
        for group in self._newest:
            if group is not but:
                group.leave_device()
        self._newest = deque(group for group in self._newest if group is but)

    def keep(self, tensor: torch.Tensor) -> "tuple[Kept, bool]":
        """The storage of ``tensor`` on its way to the host, and whether it is new there."""
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor._version)
        kept = self._by_storage.get(key)
        if kept is not None and kept.is_of_living_storage():
            return kept, False
        kept = self._by_storage[key] = Kept(self, tensor)
        return kept, True

    def count(self, num_bytes: int) -> None:
        self.host_bytes += num_bytes
        self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)


class Group:
    """Layers that are applied together, and what they keep."""

    def __init__(self, offload: Offload, held: list[torch.Tensor], before: "Group | None"):
        self._offload, self._held, self._before = offload, held, before
        self._kept: weakref.WeakSet[Kept] = weakref.WeakSet()  # the graph owns them
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> Self:
        self._offload.open(self)
        self._hooks.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._hooks.__exit__(*failure)
        self._held = []

    def leave_device(self) -> None:
        for kept in list(self._kept):
            kept.leave_device()

    def fetch(self, wanted: "Kept") -> None:
        """Begin to bring back what is not on the device: what is wanted now, the group, and the one before it."""
        if wanted.is_on_device() and self._before is None:
            return
        soon = [wanted, *self._kept, *(self._before._kept if self._before is not None else ())]
        self._before = None
        if away := [kept for kept in soon if not kept.is_on_device()]:
            self._offload.settle(but=self)
            for kept in away:
                kept.begin_to_return()

    def _pack(self, tensor: torch.Tensor) -> "Handle | torch.Tensor":
        held = next((held for held in self._held if _lies_in(tensor, held)), None)
        if held is not None and held.dtype == tensor.dtype:
            return Handle(held, _within(tensor, held), None)
        if held is not None or not self._is_worth_it(tensor):
            return tensor
        kept, is_new = self._offload.keep(tensor)
        if is_new:
            self._kept.add(kept)
        return Handle(kept, _view_of(tensor), self)

    def _is_worth_it(self, tensor: torch.Tensor) -> bool:
        is_plain = tensor.layout == torch.strided and type(tensor) in (torch.Tensor, nn.Parameter)
        if not is_plain or tensor.device.type != self._offload.device.type:
            return False
        return tensor.untyped_storage().nbytes() > self._offload.above_bytes


class View(NamedTuple):
    """How a tensor lies in what it is a view of; the offset counts elements."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Handle(NamedTuple):
    """What autograd keeps in a tensor's place."""

    of: "Kept | torch.Tensor"  # a storage on the host, or a weight
    view: View
    group: Group | None


class Kept:
    """One storage: on the device still, on the host, or on the device again."""

    def __init__(self, offload: Offload, tensor: torch.Tensor):
        flat = _bytes_of(tensor)
        self._offload, self._device, self._num_bytes = offload, flat.device, flat.numel()
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._here: torch.Tensor | None = flat
        self._host, self._left = offload.lanes.copy_out(flat)
        self._arrived: Any = None
        offload.count(self._num_bytes)
        weakref.finalize(self, offload.count, -self._num_bytes).atexit = False

    def is_of_living_storage(self) -> bool:
        """Another storage may lie at the same address when this one is gone."""
        return not self._storage.expired()

    def leave_device(self) -> None:
        if self._here is not None and self._left is not NOTHING:
            self._offload.lanes.wait(self._left)
            self._left, self._here = NOTHING, None

    def is_on_device(self) -> bool:
        return self._here is not None

    def begin_to_return(self) -> None:
        if self._here is None:
            self._here, self._arrived = self._offload.lanes.copy_in(self._host, self._device)

    def on_device(self) -> torch.Tensor:
        """uint8 [bytes]"""
        assert self._here is not None, "fetched before"
        self._offload.lanes.wait(self._arrived)
        self._arrived = None
        return self._here


NOTHING = object()  # no copy is under way any more


class Lanes:
    """Copies within a CPU's memory: done when they return."""

    def copy_out(self, flat: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return flat.clone(), None

    def copy_in(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
        return host.clone(), None

    def wait(self, event: Any) -> None:
        """The computing stream goes on when a copy is done."""


class CudaLanes(Lanes):
    """Copies beside the computing: one stream out, one in, since the bus carries both ways at once."""

    def __init__(self, device: torch.device):
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def copy_out(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        host = torch.empty(flat.numel(), dtype=torch.uint8, pin_memory=True)
        flat.record_stream(self._out)  # in case its storage is given up before the copy is done
        return host, self._copy(host, flat, self._out)

    def copy_in(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.cuda.Event]:
        # Made on the computing stream, whose own order then keeps its memory from other tensors.
        back = torch.empty(host.numel(), dtype=torch.uint8, device=device)
        back.record_stream(self._in)  # in case nobody waits for the copy: a backward pass that fails
        return back, self._copy(back, host, self._in)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, lane: torch.cuda.Stream) -> torch.cuda.Event:
        lane.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(lane):
            target.copy_(source, non_blocking=True)
            return lane.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream().wait_event(event)


def _unpack(packed: "Handle | torch.Tensor") -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    view = packed.view
    if isinstance(packed.of, torch.Tensor):
        weight = packed.of.detach()
        return weight.as_strided(view.size, view.stride, weight.storage_offset() + view.offset)
    assert packed.group is not None
    packed.group.fetch(packed.of)
    storage = packed.of.on_device().untyped_storage()
    back = torch.empty(0, dtype=view.dtype, device=storage.device)
    return back.set_(storage, view.offset, view.size, view.stride)  # type: ignore[call-overload]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage, as uint8 [bytes]."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]


def _view_of(tensor: torch.Tensor) -> View:
    return View(tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _lies_in(tensor: torch.Tensor, held: torch.Tensor) -> bool:
    """By address: gathered weights of ZeRO-3 share a storage."""
    return 0 <= tensor.data_ptr() - held.data_ptr() < held.nbytes


def _within(tensor: torch.Tensor, held: torch.Tensor) -> View:
    return _view_of(tensor)._replace(offset=int(tensor.storage_offset() - held.storage_offset()))
