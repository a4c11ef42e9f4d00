"""Bytes of weights, gradients, optimizer states and fixed buffers on one rank, as DeepSpeed 0.19 keeps them.

Which of DeepSpeed's optimizers stands behind a ZeRO stage depends on number formats, and they differ by more than the
paper's formula (Rajbhandari et al. 2020, arXiv:1910.02054, section 5) lets on:

- stage 1 with bf16 weights and fp32 sums is `BF16_Optimizer`: whole fp32 gradients stand beside whole bf16 ones;
- every other stage 1 or 2 is `DeepSpeedZeroOptimizer`: with fp32 weights its masters are a second copy of them, and
  gradients pass through buckets that are allocated whole, two of them where communication overlaps;
- stage 3 keeps its bucket, and all gradients' shards, for good; small parameters are not sharded; gathered ones stay
  until they are used again if that is near.

All of it was compared with what tensors really take (tests/launch/test_memory.py).
"""

from collections.abc import Callable
from typing import NamedTuple

from launch.optimizer_states import BY_SHAPE, bytes_per_parameter, shaped_bytes
from launch.scenario import Scenario
from model_providers.layout import Layout
from model_providers.tensor_shapes import TensorShape
from pretrain.ds_config import Buckets
from pretrain.ds_offload import usual_swap_buffers

VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER_BYTES = 4
ALIGNMENT = 2  # elements of each copy's partition, deepspeed/runtime/zero/stage_1_and_2.py


class Held(NamedTuple):
    """Elements of parameters on one rank."""

    dense: int
    experts: int
    small: int = 0  # of ``dense``, those that ZeRO-3 leaves whole
    largest_chunk: int = 0  # of both, in one run of layers of a pipeline
    largest_tensor: int = 0
    gathered: int = 0  # most that ZeRO-3 holds whole at once
    bucket: int = 0  # through which gradients pass
    tensors: tuple[TensorShape, ...] = ()  # all, in order: some optimizers ask

    @property
    def all(self) -> int:
        return self.dense + self.experts


class StateBytes(NamedTuple):
    """In one kind of memory; all but the last depend on no batch."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0
    activations: int = 0  # of layers, waiting in the CPU's memory; on the device they are counted apart

    @property
    def total(self) -> int:
        return sum(self)


class States(NamedTuple):
    device: StateBytes
    cpu: StateBytes = StateBytes()
    nvme: StateBytes = StateBytes()
    passing: int = (
        0  # gradients on the device that come as a backward pass lets activations go, and do not stay
    )


def states(scenario: Scenario, held: Held) -> States:
    return _keeper(scenario)(scenario, held)


def _keeper(scenario: Scenario) -> Callable[[Scenario, Held], States]:
    """As deepspeed/runtime/engine.py, _do_optimizer_sanity_check, chooses."""
    if scenario.zero_stage == 0:
        return _plain
    if scenario.zero_stage == 3:
        return _sharded
    sums_wide = (scenario.dtype, _sum_format(scenario)) == ("bf16", "fp32")
    if scenario.zero_stage == 1 and sums_wide and scenario.offload_optimizer == "none":
        return _bf16
    return _partitioned


def _plain(scenario: Scenario, held: Held) -> States:
    """No ZeRO: gradients where torch leaves them; masters beside 16-bit weights, as in the paper's baseline."""
    size = VALUE_BYTES[scenario.dtype]
    masters = MASTER_BYTES if size < MASTER_BYTES else 0
    stay, pass_ = _by_stay(scenario, size * held.all)
    optimizer = masters * held.all + own_states(scenario, held, held.all)
    return States(StateBytes(size * held.all, stay, optimizer), passing=pass_)


def own_states(scenario: Scenario, held: Held, share: int) -> int:
    """Bytes that the optimizer keeps beside masters, of the ``share`` elements that are this rank's."""
    choice, layout = scenario.optimizer, scenario.layout
    if choice.kind not in BY_SHAPE:
        return bytes_per_parameter(choice) * share
    return shaped_bytes(
        choice,
        held.tensors,
        zero_stage=scenario.zero_stage,
        copies=layout.dp,
        expert_copies=layout.expert_dp if layout.ep > 1 else None,
    )


def _by_stay(scenario: Scenario, gradients: int) -> tuple[int, int]:
    """Those that are there when activations are most, and those that come while they go."""
    comes_late = scenario.num_micro_batches == 1 or (scenario.layout.pp > 1 and scenario.schedule == "gpipe")
    return (0, gradients) if comes_late else (gradients, 0)


def _bf16(scenario: Scenario, held: Held) -> States:
    """`BF16_Optimizer`: a flat fp32 sum of everything, and bf16 gradients of what a backward pass goes through.

    The latter stay from one pass to the next, but our pipeline lets them go (engine/stage_gradients.py).
    """
    share = shard(held, scenario.layout)
    stay, pass_ = _by_stay(scenario, 2 * held.all)
    if scenario.layout.pp > 1:
        stay, pass_ = 0, 2 * held.largest_chunk
    optimizer = MASTER_BYTES * share + own_states(scenario, held, share)
    return States(StateBytes(2 * held.all, 4 * held.all + stay, optimizer), passing=pass_)


def _partitioned(scenario: Scenario, held: Held) -> States:
    """`DeepSpeedZeroOptimizer`, with or without its optimizer in CPU memory."""
    size, sums = VALUE_BYTES[scenario.dtype], VALUE_BYTES[_sum_format(scenario)]
    share = shard(held, scenario.layout)
    is_offloaded = scenario.offload_optimizer != "none"
    is_compact = (
        sums > size
    )  # 16-bit gradients are summed into a flat fp32 partition, which stays on the device
    gradients, pass_ = sums * share if is_compact else 0, 0
    if not is_offloaded:
        gradients, pass_ = _by_stay(scenario, sums * share)
    if scenario.zero_stage == 1:
        gradients, pass_ = _by_stay(scenario, sums * held.all)
        gradients += sums * share if is_compact else 0
    buffers = _buckets(scenario, held, sums if scenario.zero_stage == 1 else size)
    optimizer = MASTER_BYTES * share + own_states(scenario, held, share)
    if not is_offloaded:
        return States(StateBytes(size * held.all, gradients, optimizer, buffers), passing=pass_)
    one = size * held.largest_tensor  # its gradient, on the way
    saved = 0 if is_compact or scenario.num_micro_batches == 1 else size * share
    return States(
        StateBytes(size * held.all, gradients, 0, buffers + one),
        cpu=StateBytes(0, MASTER_BYTES * share + saved, optimizer, size * share + one),
        passing=pass_,
    )


def _sharded(scenario: Scenario, held: Held) -> States:
    """`DeepSpeedZeroOptimizer_Stage3`: a layer is whole while it computes, and near its next use."""
    size, sums = VALUE_BYTES[scenario.dtype], VALUE_BYTES[_sum_format(scenario)]
    share = shard(held, scenario.layout)
    # Layers on NVMe are let go at once: the one at work, and the one that is read ahead.
    gathered = 2 * held.largest_tensor if scenario.offload_parameters == "nvme" else held.gathered
    whole = StateBytes(size * held.small, buffers=_buckets(scenario, held, sums, most=1) + size * gathered)
    device = [whole]
    cpu: list[StateBytes] = []
    nvme: list[StateBytes] = []
    place = {"none": device, "cpu": cpu, "nvme": nvme}
    place[scenario.offload_parameters].append(StateBytes(size * share))
    optimizer, gradients = (
        MASTER_BYTES * share + own_states(scenario, held, share),
        StateBytes(gradients=sums * share),
    )
    if scenario.offload_optimizer == "none":
        device += [StateBytes(optimizer=optimizer), gradients]
    else:  # sums over micro-batches, and once more in fp32 for the optimizer
        cpu.append(gradients)
        once_more = StateBytes(gradients=MASTER_BYTES * share, optimizer=optimizer)
        there, here = _divided(once_more, scenario.offload_ratio)
        place[scenario.offload_optimizer].append(there)
        device.append(here)
    cpu.append(StateBytes(buffers=_swap_bytes(scenario, held, size)))
    return States(_together(device), _together(cpu), _together(nvme))


def _divided(whole: StateBytes, ratio: float) -> tuple[StateBytes, StateBytes]:
    """The share that is offloaded, and the rest."""
    there = StateBytes(*(round(ratio * kind) for kind in whole))
    return there, StateBytes(*(kind - away for kind, away in zip(whole, there, strict=True)))


def _swap_bytes(scenario: Scenario, held: Held, value_bytes: int) -> int:
    """Swapping to NVMe takes buffers in the CPU's memory."""
    swap = scenario.swap or usual_swap_buffers(held.largest_tensor // scenario.layout.dp)
    total = 0
    if scenario.offload_optimizer == "nvme":
        total += swap.optimizer_buffers * MASTER_BYTES * swap.sub_group
    if scenario.offload_parameters == "nvme":  # and one for a sub-group's new weights
        total += value_bytes * (swap.parameter_buffers * swap.parameter + swap.sub_group)
    return total


def _together(parts: list[StateBytes]) -> StateBytes:
    return StateBytes(*map(sum, zip(*parts, strict=True))) if parts else StateBytes()


def shard(held: Held, layout: Layout) -> int:
    """Elements of one copy's partition; there are fewer copies of experts that ep shares out."""
    copies = layout.expert_dp if layout.ep > 1 else layout.dp
    return _partition(held.dense, layout.dp) + _partition(held.experts, copies)


def _partition(elements: int, copies: int) -> int:
    return -(-elements // (ALIGNMENT * copies)) * ALIGNMENT


def _sum_format(scenario: Scenario) -> str:
    return "fp32" if scenario.dtype == "fp32" else scenario.gradient_dtype


def _buckets(scenario: Scenario, held: Held, value_bytes: int, *, most: int = 2) -> int:
    """Megaloom's JSON files overlap messages with computing from stage 2 on; DeepSpeed does not in a pipeline."""
    usual = held.largest_tensor if scenario.offload_optimizer == "nvme" else held.bucket
    buckets = scenario.buckets or Buckets(usual, 2 if scenario.zero_stage >= 2 else 1)
    if scenario.layout.pp > 1:
        most = 1
    return min(most, buckets.number) * value_bytes * buckets.elements
