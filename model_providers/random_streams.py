"""Where dropout draws from, on CPU and CUDA alike: a function of (seed, step, micro-batch, layer), with no state.

Two streams, as in megatron-core: the default generator, equal on the ranks of a tensor group (they hold the
same activations), and the tracker's model-parallel stream, different on each (they hold different heads or
sequence shards).  Every layer that draws begins both anew with its own name (`layer_plan.PlanModule`), the engine
tells the micro-batch, and the loop the step.  So neither a restart, nor recompute, nor the number of stages, chunks
and replicas, nor the order in which a schedule works changes a mask.

On the CPU the default generator is torch's own: shuffling and sampling must use a Generator of their own.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel import random as mcore_random

MODEL_PARALLEL_STREAM = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME
DATA_PARALLEL_STREAM = mcore_random._DATA_PARALLEL_RNG_TRACKER_NAME


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits from a sequence of numbers and names; neighbours are unrelated."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class CpuStreamTracker(mcore_random.CudaRNGStatesTracker):
    """megatron-core's tracker over torch's CPU generator.

    Its ``add`` and ``fork`` speak to torch.cuda directly, and its fork warns when the CPU state moves, which
    here is the point.
    """

    states_: dict[str, torch.Tensor]
    _current_state_name: str

    def add(self, name: str, seed: int) -> None:
        assert name not in self.states_, f"stream {name} exists"
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = MODEL_PARALLEL_STREAM) -> Iterator[None]:
        assert name in self.states_, f"stream {name} is not seeded: call seed_streams first"
        outer_name, outer_state = self._current_state_name, torch.get_rng_state()
        if outer_name in self.states_:
            self.states_[outer_name] = outer_state
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            # A fork of the same stream inside itself must not be wound back.
            torch.set_rng_state(self.states_.get(outer_name, outer_state))
            self._current_state_name = outer_name


def open_tracker(device: str) -> mcore_random.CudaRNGStatesTracker:
    """The tracker that megatron-core's modules look up, made if there is none.

    Its streams wait to be seeded, but for one on CUDA, for Transformer Engine.
    """
    if device == "cpu":
        if not isinstance(mcore_random._CUDA_RNG_STATE_TRACKER, CpuStreamTracker):
            mcore_random._CUDA_RNG_STATE_TRACKER = CpuStreamTracker()
            mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
        return mcore_random._CUDA_RNG_STATE_TRACKER
    if isinstance(mcore_random._CUDA_RNG_STATE_TRACKER, CpuStreamTracker):
        mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False  # what ran on the CPU before had its own
    tracker = mcore_random.get_cuda_rng_tracker()
    if not tracker.is_initialized():
        # Transformer Engine asks only once, when a layer is built, whether there will be streams, and draws weights
        # from the model-parallel one, which `initial` draws anew.
        tracker.add(MODEL_PARALLEL_STREAM, 0)
    return tracker


class _Now:
    """Where this rank is in the run; what the streams are derived from."""

    parts: tuple[int | str, ...] = ()
    tp_rank = 0
    device = "cpu"
    micro_batch = 0


def seed_streams(seed: int, *, step: int = 0, tp_rank: int = 0, device: str = "cpu") -> None:
    """Begin a step: both streams start afresh, for what draws outside layers."""
    _Now.parts, _Now.tp_rank, _Now.device, _Now.micro_batch = (seed, step), tp_rank, device, 0
    _start(*_Now.parts)


def begin_micro_batch(number: int) -> None:
    """``number``: counted over all data-parallel ranks of the step, so that masks go with samples."""
    _Now.micro_batch = number


def begin_layer(name: str) -> None:
    """Both streams are at the beginning of this layer's, for the current micro-batch."""
    _start(*_Now.parts, _Now.micro_batch, name)


def _start(*parts: int | str) -> None:
    tracker = open_tracker(_Now.device)
    tracker.reset()
    shared = derive_seed("default", *parts)
    if _Now.device == "cpu":
        torch.default_generator.manual_seed(shared)  # torch.manual_seed would queue one for CUDA too
    else:
        torch.cuda.manual_seed(shared)
    tracker.add(DATA_PARALLEL_STREAM, shared)
    tracker.add(MODEL_PARALLEL_STREAM, derive_seed("model-parallel", *parts, _Now.tp_rank))


def generator_here(name: str, device: torch.device, *, is_cut: bool) -> torch.Generator:
    """A generator of its own for something called ``name``, a function of where this rank is like the streams.

    ``is_cut``: tensor ranks hold different shares of it, else the same numbers.
    """
    seed = derive_seed("own", *_Now.parts, _Now.micro_batch, name, _Now.tp_rank if is_cut else 0)
    return torch.Generator(device).manual_seed(seed)
