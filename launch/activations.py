"""Bytes of activations on one rank: what its layers keep of a micro-batch, times those under way at the worst moment.

The worst moment is looked for in the schedule itself: before each backward pass, every chunk has some micro-batches'
activations, and under full recompute one group of layers is about to come back.
"""

from collections.abc import Sequence
from functools import lru_cache
from operator import ge
from typing import NamedTuple

from launch.model_states import VALUE_BYTES
from launch.scenario import Scenario
from model_providers.activation_memory import RecomputeMode
from model_providers.config import ModelConfig
from model_providers.cost import LayerCost, layer_costs
from model_providers.fp8.config import Fp8Config
from model_providers.tensor_shares import LayerShare, fp8_places, layer_shares
from pretrain.engine.schedules.catalogue import make_schedule, placement_of
from pretrain.engine.schedules.ops import Kind, Order

Span = tuple[int, int]  # layers of one chunk: the first, and the one after the last
NEWEST_GROUPS = 2  # of layers whose activations are on the device with offload, engine/activation_offload.py
WAVES = 2  # micro-batches for each stage: a test holds it beside what a hundred hold


class ChunkActivations(NamedTuple):
    """Bytes per token of one run of layers, for one micro-batch."""

    kept: float  # from its forward pass to its backward pass
    # Beside ``kept``, the most inside of a group of layers in the backward pass: more by what comes back there, less by
    # what layers behind it have let go.
    inside: float
    waiting: float  # after the first half of a backward pass, until weight gradients are computed
    on_host: float = 0.0  # what waits in the CPU's memory, and is not in ``kept``
    newest: float = 0.0  # of that, what is on the device all the same, whichever micro-batch is at work

    @property
    def again(self) -> float:
        """More than ``kept``, while the backward pass computes a group of layers again."""
        return max(0.0, self.inside)


class Moment(NamedTuple):
    """Before a backward pass: its chunk, and by chunk the micro-batches kept, and those whose weights' half waits."""

    chunk: int | None  # None: before such a half
    kept: tuple[int, ...]
    waiting: tuple[int, ...]


class Facts(NamedTuple):
    """What activations depend on, and nothing else: keys of a cache."""

    model: ModelConfig
    sequence_length: int
    target_length: int | None
    recompute: RecomputeMode
    every: int
    tp: int
    etp: int
    sequence_parallel: bool
    bytes_per_value: int
    fused: bool
    modules: tuple[str, ...]  # that selective recompute forgets
    chunk_tokens: int | None  # of the loss
    offloads: bool = False
    fp8: Fp8Config | None = None


def facts_of(scenario: Scenario) -> Facts:
    layout = scenario.layout
    return Facts(
        scenario.model,
        scenario.sequence_length,
        scenario.target_length,
        scenario.recompute,
        scenario.recompute_every,
        layout.tp,
        layout.expert_tp,
        layout.shards_sequence,
        VALUE_BYTES[scenario.dtype],
        scenario.fused,
        scenario.recompute_modules,
        scenario.chunk_tokens,
        scenario.offloads_activations,
        scenario.fp8,
    )


class Peak(NamedTuple):
    """Of one rank, at its worst moment: bytes, or bytes per token of a micro-batch."""

    activations: float
    messages: float  # outputs that stay until their gradient comes
    freed: float  # by the backward pass of a micro-batch through the smallest chunk
    on_host: float  # the most that waits in the CPU's memory


def peak_activations(scenario: Scenario, facts: Facts, rank: int, spans: tuple[Span, ...]) -> Peak:
    """The most at once on pipeline rank ``rank``, whose chunks are ``spans``."""
    tokens = scenario.micro_size * scenario.sequence_length
    way = Way(scenario.schedule, scenario.layout.pp, scenario.layout.chunks, scenario.num_micro_batches)
    per_token = _peak_per_token(facts, way.as_far_as_it_matters(), rank, spans)
    return Peak(*(tokens * each for each in per_token))


class Way(NamedTuple):
    """How micro-batches go through a pipeline."""

    schedule: str
    stages: int
    chunks: int
    num_micro_batches: int

    def as_far_as_it_matters(self) -> "Way":
        """No schedule but GPipe holds more after some waves."""
        if self.stages == 1:
            return self._replace(num_micro_batches=1)
        if self.schedule == "gpipe":
            return self
        return self._replace(num_micro_batches=min(self.num_micro_batches, WAVES * self.stages))


@lru_cache(maxsize=1 << 16)
def _peak_per_token(facts: Facts, way: Way, rank: int, spans: tuple[Span, ...]) -> Peak:
    chunks = [chunk_activations(facts, *span) for span in spans]
    moments = worst_moments(way, rank, by_chunk=facts.recompute != "none")
    worst = max(moments, key=lambda moment: _bytes_per_token(moment, chunks))
    activations = _bytes_per_token(worst, chunks)
    handed = sum(
        number for number, hands_over in zip(worst.kept, _hands_over(way, rank), strict=True) if hands_over
    )
    on_host = max(
        sum(number * chunk.on_host for number, chunk in zip(moment.kept, chunks, strict=True))
        for moment in moments
    )
    freed = min(chunk.kept for chunk in chunks)
    return Peak(activations, handed * hidden_bytes(facts), freed, on_host)


def _bytes_per_token(moment: Moment, chunks: Sequence[ChunkActivations]) -> float:
    total = chunks[moment.chunk].again if moment.chunk is not None else 0.0
    total += max(chunk.newest for chunk in chunks)
    for kept, waiting, chunk in zip(moment.kept, moment.waiting, chunks, strict=True):
        total += kept * chunk.kept + waiting * chunk.waiting
    return total


def _hands_over(way: Way, rank: int) -> list[bool]:
    """By chunk, whether what it makes goes to another rank; else it is the next chunk's input."""
    placement = placement_of(way.schedule, stages=way.stages, chunks=way.chunks)
    stages = [placement.virtual_stage(rank, chunk) for chunk in range(way.chunks)]
    return [stage < placement.last and placement.rank(stage + 1) != rank for stage in stages]


@lru_cache(maxsize=1 << 16)
def chunk_activations(facts: Facts, start: int, stop: int) -> ChunkActivations:
    """Of the layers from ``start`` to before ``stop``."""
    costs, plain = _kept_by_layer(facts), _back_by_layer(facts)
    shares = layer_shares(facts.model)
    is_full = facts.recompute == "full"
    bounds = groups(shares, start, stop, every=facts.every if is_full else 1)
    inputs = {first for first, _ in bounds}  # under full recompute, of a group its input alone
    kept, up_to = 0.0, {}
    for index in range(start, stop):
        up_to[index] = kept
        if index in inputs or not shares[index].is_checkpointable:
            kept += costs[index]
    memory = _memory(facts, start, stop)
    inside = max((up_to[first] + sum(plain[first:last]) - kept for first, last in bounds), default=-kept)
    on_host, newest = _offloaded(facts, start, bounds) if facts.offloads else (0.0, 0.0)
    return ChunkActivations(
        kept=kept + memory - on_host,
        inside=inside,
        waiting=_waiting(facts, start, stop),
        on_host=on_host,
        newest=newest,
    )


def _offloaded(facts: Facts, start: int, bounds: list[tuple[int, int]]) -> tuple[float, float]:
    """What the groups of layers keep, but for an input that another rank sent; and what is of the newest groups
    (engine/activation_offload.py).
    """
    costs = _kept_by_layer(facts)
    is_full = facts.recompute == "full"
    by_group = [costs[first] if is_full else sum(costs[first:last]) for first, last in bounds]
    if by_group and start > 0 and bounds[0][0] == start:
        by_group[0] -= hidden_bytes(facts)
    return sum(by_group), sum(sorted(by_group)[-NEWEST_GROUPS:])


def groups(shares: tuple[LayerShare, ...], start: int, stop: int, *, every: int) -> list[tuple[int, int]]:
    """Bounds of groups of layers that are computed again together, as engine/layers.py cuts them."""
    found: list[tuple[int, int]] = []
    for index in range(start, stop):
        if not shares[index].is_checkpointable:
            continue
        first, last = found[-1] if found else (index, -1)
        if last == index and index - first < every:
            found[-1] = (first, index + 1)
        else:
            found.append((index, index + 1))
    return found


def hidden_bytes(facts: Facts) -> float:
    """What flows between layers, per token."""
    return facts.bytes_per_value * facts.model.hidden_size / (facts.tp if facts.sequence_parallel else 1)


def _memory(facts: Facts, start: int, stop: int) -> float:
    """What an encoder made, which every layer of a decoder on this rank reads: there once."""
    if facts.model.t5 is None or stop <= facts.model.t5.num_encoder_layers + 3:
        return 0.0
    return hidden_bytes(facts)


def _waiting(facts: Facts, start: int, stop: int) -> float:
    """Of each linear its input and its output's gradient (model_providers/weight_gradients.py)."""
    m, size = facts.model, facts.bytes_per_value
    if m.moe is not None or m.mla is not None or m.family != "gpt":
        return sum(_kept_by_layer(facts)[start:stop])  # not looked at apart: as much as was kept
    fc1 = (2 if m.is_gated else 1) * m.ffn_width
    inside = 2 * m.query_width + 2 * m.kv_width + m.ffn_width + fc1
    block = size * inside / facts.tp + 4 * hidden_bytes(facts)
    number = sum(share.is_checkpointable for share in layer_shares(m)[start:stop])
    narrow = 0.0
    if facts.fp8 is not None:  # operands in eight bits, whole sequences, but for shards of columns' inputs
        one, h = facts.fp8.bytes_per_number, m.hidden_size
        columns = 2 * (hidden_bytes(facts) if facts.sequence_parallel and facts.tp > 1 else one * h)
        fewer = sum(start <= place < stop for place in fp8_places(m, facts.fp8))
        narrow = fewer * (one * inside / facts.tp + columns + 2 * one * h - block)
    has_head = stop == m.num_plan_layers and facts.chunk_tokens is None  # in chunks nothing of it waits
    head = size * m.padded_vocab_size / facts.tp + hidden_bytes(facts) if has_head else 0.0
    return number * block + narrow + head


def _kept_by_layer(facts: Facts) -> tuple[float, ...]:
    return tuple(cost.activation_bytes_per_token for cost in _costs(facts))


def _back_by_layer(facts: Facts) -> tuple[float, ...]:
    """Once what recompute forgets is there again, the most of it that is there at once."""
    if facts.recompute != "selective":
        return _kept_by_layer(facts._replace(recompute="none"))
    return tuple(cost.activation_bytes_per_token + cost.again_bytes_per_token for cost in _costs(facts))


@lru_cache(maxsize=4096)
def _costs(facts: Facts) -> tuple[LayerCost, ...]:
    costs = layer_costs(
        facts.model,
        facts.sequence_length,
        target_length=facts.target_length,
        recompute=facts.recompute,
        recompute_modules=facts.modules,
        chunked_loss=facts.chunk_tokens is not None,
        tp=facts.tp,
        etp=facts.etp,
        sequence_parallel=facts.sequence_parallel,
        bytes_per_value=facts.bytes_per_value,
        fused=facts.fused,
        fp8=facts.fp8,
    )
    return tuple(costs)


@lru_cache(maxsize=1 << 16)
def worst_moments(way: Way, rank: int, *, by_chunk: bool) -> tuple[Moment, ...]:
    """Those at which no other holds as much of every chunk; ``by_chunk``: whose backward pass, matters."""
    if way.stages == 1:
        return (Moment(0, (1,), (0,)),)
    if way.schedule == "gpipe":
        return (Moment(0, (way.num_micro_batches,), (0,)),)
    return _undominated(_moments(_orders(way)[rank], way.chunks, by_chunk=by_chunk))


@lru_cache(maxsize=64)
def _orders(way: Way) -> tuple[Order, ...]:
    schedule, stages, chunks, num_micro_batches = way
    return make_schedule(schedule, stages=stages, chunks=chunks, num_micro_batches=num_micro_batches).orders


def _moments(order: Order, chunks: int, *, by_chunk: bool) -> set[Moment]:
    splits = any(op.kind == Kind.WEIGHT for op in order)
    kept, waiting = [0] * chunks, [0] * chunks
    found = set()
    for op in order:
        if op.kind == Kind.FORWARD:
            kept[op.chunk] += 1
            continue
        is_half = op.kind == Kind.WEIGHT
        found.add(Moment(op.chunk if by_chunk and not is_half else None, tuple(kept), tuple(waiting)))
        if is_half:
            waiting[op.chunk] -= 1
        else:
            kept[op.chunk] -= 1
            waiting[op.chunk] += splits
    return found


def _undominated(moments: set[Moment]) -> tuple[Moment, ...]:
    """Without those that another of the same chunk covers; one that holds more in all cannot be covered by less."""
    fronts: dict[int | None, list[tuple[int, ...]]] = {}
    left = []
    for moment in sorted(moments, key=lambda each: -sum(each.kept) - sum(each.waiting)):
        held = (*moment.kept, *moment.waiting)
        front = fronts.setdefault(moment.chunk, [])
        if not any(all(map(ge, other, held)) for other in front):
            front.append(held)
            left.append(moment)
    return tuple(left)
