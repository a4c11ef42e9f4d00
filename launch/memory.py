"""What a scenario takes of each rank's memory: weights, gradients, optimizer states, activations, buffers.

One record for each pipeline rank.  All tensor and expert places of a stage hold the same: what is cut is cut evenly,
the rest is whole on each, and a partition that would be uneven is padded.  Experts are counted for a balanced router.
Bytes are those of tensors; what an allocator, CUDA's context and NCCL need comes on top (`RESERVE_GIB` in estimate.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from launch.activations import (
    Facts,
    Span,
    chunk_activations,
    facts_of,
    peak_activations,
)
from launch.model_states import Held, StateBytes, own_states, states
from launch.scenario import Scenario
from model_providers.config import ModelConfig
from model_providers.layout import Layout
from model_providers.loss_chunks import tokens_of_a_chunk
from model_providers.tensor_shapes import TensorShape, layer_shapes, word_shape
from model_providers.tensor_shares import LayerShare, fp8_places, layer_shares, word_share
from pretrain.engine.schedules.catalogue import SPLIT_BACKWARD

MAX_BUCKET_ELEMENTS = 500_000_000  # of "auto" bucket sizes, pretrain/ds_config.py
MAX_REUSE_ELEMENTS = 1_000_000_000  # stage3_max_reuse_distance, deepspeed/runtime/zero/config.py
PREFETCH_SQUARES = 0.9  # stage3_prefetch_bucket_size in widths squared, pretrain/ds_config.py
LOSS_BYTES = 4  # of a logit in the loss, model_providers/losses.py


class DeviceBytes(NamedTuple):
    """Each kind at its most, and how much of them is never there together."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int  # through which gradients and gathered weights pass
    workspace: int  # about, of the operation that needs most: fp32 logits, gradients of activations
    not_together: int  # gradients that come as a backward pass lets activations go

    @property
    def total(self) -> int:
        """At the worst moment."""
        return sum(self[:-1]) - self.not_together


@dataclass(frozen=True)
class RankMemory:
    """Of one rank of a pipeline stage."""

    stage: int
    layers: tuple[Span, ...]  # by chunk
    num_parameters: int  # on this rank, before ZeRO divides them
    device: DeviceBytes
    cpu: StateBytes
    nvme: StateBytes


@dataclass(frozen=True)
class Memory:
    ranks: tuple[RankMemory, ...]  # by stage

    @property
    def heaviest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.device.total)


def memory(scenario: Scenario) -> Memory:
    """Of every pipeline rank."""
    return Memory(tuple(rank_memory(scenario, rank) for rank in range(scenario.layout.pp)))


def rank_memory(scenario: Scenario, rank: int) -> RankMemory:
    facts, spans = facts_of(scenario), spans_of(scenario, rank)
    held = held_by(scenario.model, scenario.layout, spans)
    kept, peak = states(scenario, held), peak_activations(scenario, facts, rank, spans)
    device = DeviceBytes(
        parameters=kept.device.parameters,
        gradients=kept.device.gradients + kept.passing,
        optimizer=kept.device.optimizer,
        activations=round(peak.activations),
        buffers=kept.device.buffers + round(peak.messages) + eight_bit_copies(scenario, spans),
        workspace=round(_workspace(scenario, facts, rank, spans)),
        not_together=min(kept.passing, round(peak.freed)),
    )
    cpu = kept.cpu._replace(activations=round(peak.on_host))
    return RankMemory(rank, spans, held.all, device, cpu, kept.nvme)


def spans_of(scenario: Scenario, rank: int) -> tuple[Span, ...]:
    """The layers of each of a rank's chunks."""
    bounds, placement = scenario.stage_bounds, scenario.placement
    stages = (placement.virtual_stage(rank, chunk) for chunk in range(placement.chunks))
    return tuple((bounds[stage], bounds[stage + 1]) for stage in stages)


def eight_bit_copies(scenario: Scenario, spans: tuple[Span, ...]) -> int:
    """Of weights, both ways round, for a step's time (fp8/copies.py); under ZeRO-3 of the one at work."""
    model, layout, fp8 = scenario.model, scenario.layout, scenario.fp8
    if fp8 is None:
        return 0
    places, shapes = (
        set(fp8_places(model, fp8)),
        layer_shapes(model, tp=layout.tp, ep=layout.ep, etp=layout.expert_tp),
    )
    whole = scenario.zero_stage < 3  # else one matrix at a time, one expert's too
    elements = [
        shape.elements if whole or not shape.is_expert else shape.elements // shape.lengths[0]
        for start, stop in spans
        for place in range(start, stop)
        for shape in shapes[place]
        if place in places and shape.is_hidden and (fp8.takes_experts or not shape.is_expert)
    ]
    at_once = sum(elements) if whole else max(elements, default=0)
    return round(2 * fp8.bytes_per_number * at_once) if fp8.recipe != "blockwise" else 2 * at_once


@lru_cache(maxsize=1 << 16)
def held_by(model: ModelConfig, layout: Layout, spans: tuple[Span, ...]) -> Held:
    """Elements of parameters in these runs of layers, a copy of the words included where a tie needs one."""
    shares = layer_shares(model, tp=layout.tp, ep=layout.ep, etp=layout.expert_tp)
    chunks = [_chunk(shares, span) for span in spans]
    here = [share for start, stop in spans for share in shares[start:stop]]
    copied = 0
    if all(start > 0 for start, _ in spans) and any(share.reads_words for share in here):
        copied = word_share(model, layout.tp)
    return Held(
        dense=sum(share.dense for share in here) + copied,
        experts=sum(share.experts for share in here),
        small=sum(share.small for share in here),
        largest_chunk=max(chunks) + copied,
        largest_tensor=_largest_tensor(model, layout),
        gathered=gathered_elements(here, model.hidden_size),
        bucket=_bucket(model, layout),
        tensors=_tensors(model, layout, spans, has_copy=copied > 0),
    )


def _tensors(
    model: ModelConfig, layout: Layout, spans: tuple[Span, ...], *, has_copy: bool
) -> tuple[TensorShape, ...]:
    shapes = layer_shapes(model, tp=layout.tp, ep=layout.ep, etp=layout.expert_tp)
    found = [shape for start, stop in spans for layer in shapes[start:stop] for shape in layer]
    return tuple([*found, word_shape(model, layout.tp)] if has_copy else found)


def _chunk(shares: tuple[LayerShare, ...], span: Span) -> int:
    return sum(share.all for share in shares[slice(*span)])


def _largest_tensor(model: ModelConfig, layout: Layout) -> int:
    """Elements of the largest parameter of a rank."""
    h, gates = model.hidden_size, 2 if model.is_gated else 1
    sizes = [word_share(model, layout.tp), *_block_matrices(model, layout.tp)]
    if model.moe is not None:
        width = gates * model.moe.ffn_hidden_size // layout.expert_tp
        sizes.append(model.moe.num_experts // layout.ep * width * h)
    return max(sizes)


def _block_matrices(model: ModelConfig, tp: int) -> Iterator[int]:
    h, gates = model.hidden_size, 2 if model.is_gated else 1
    yield gates * model.ffn_width * h // tp
    yield (model.query_width + 2 * model.kv_width) * h // tp


@lru_cache(maxsize=4096)
def _bucket(model: ModelConfig, layout: Layout) -> int:
    """As pretrain/ds_config.py fills in "auto": a rank's parameters on average, an even number, not above the most."""
    shares = layer_shares(model, tp=layout.tp, ep=layout.ep, etp=layout.expert_tp)
    mean = sum(share.all for share in shares) // layout.pp
    return max(2, min(MAX_BUCKET_ELEMENTS, mean + mean % 2))


def gathered_elements(shares: list[LayerShare], hidden_size: int) -> int:
    """Most that ZeRO-3 holds whole at once, between the forward and the backward pass.

    What is used again within `MAX_REUSE_ELEMENTS` is not let go (deepspeed/runtime/zero/
    partitioned_param_coordinator.py, __params_to_release): the last layers stay.
    """
    sizes = [share.all - share.small for share in shares]
    after = stay = 0
    for size in reversed(sizes):
        if 2 * after >= MAX_REUSE_ELEMENTS:
            break
        after, stay = after + size, stay + size
    prefetched = round(PREFETCH_SQUARES * hidden_size**2)
    return min(sum(sizes), max(stay, max(sizes, default=0) + prefetched))


def _workspace(scenario: Scenario, facts: Facts, rank: int, spans: tuple[Span, ...]) -> float:
    placement = scenario.placement
    has_loss = rank == placement.rank(placement.last) and scenario.model.electra is None
    comes_back = chunk_activations(facts, *spans[-1]).again > 0  # then activations are most inside a block
    is_plain = (
        not comes_back
        and facts.recompute != "full"
        and not facts.offloads
        and len(spans) == 1
        and scenario.schedule not in SPLIT_BACKWARD
    )
    tokens = scenario.micro_size * scenario.sequence_length
    return _workspace_of(facts, tokens, spans[-1], has_loss, is_plain)


@lru_cache(maxsize=1 << 14)
def _workspace_of(facts: Facts, tokens: int, last: Span, has_loss: bool, is_plain: bool) -> float:
    """``is_plain``: activations are most when the loss's backward pass begins, where the rank has the loss."""
    block = _block_workspace(facts, tokens)
    if not has_loss:
        return block
    # When the backward pass comes to the blocks, it has let the logits go.
    inside = tokens * chunk_activations(facts, *last).inside if is_plain else 0.0
    return max(block + inside, _loss_workspace(facts, tokens))


def _loss_workspace(facts: Facts, tokens: int) -> float:
    """fp32 logits, made one time in the loss and one in its gradient (on CUDA; on a CPU in small pieces); then, the
    gradients of the head's weight and input.
    """
    rows = tokens if facts.target_length is None else tokens // facts.sequence_length * facts.target_length
    if facts.chunk_tokens is not None:
        return _chunked_loss_workspace(facts, rows, tokens_of_a_chunk(facts.chunk_tokens, rows))
    wide = LOSS_BYTES * rows * facts.model.padded_vocab_size / facts.tp
    hidden = (
        rows * facts.bytes_per_value * facts.model.hidden_size
    )  # of all tokens, and what is summed over tp
    gradients = facts.bytes_per_value * word_share(facts.model, facts.tp) + hidden * min(2, facts.tp)
    return max(wide, gradients)


def _chunked_loss_workspace(facts: Facts, rows: int, chunk: int) -> float:
    """One chunk's logits, their copy in fp32 if they are not; the sum of the weight's gradient in fp32, and at the end
    its copy in 16 bit; and the input's gradient.
    """
    size, words = facts.bytes_per_value, word_share(facts.model, facts.tp)
    is_half = size < LOSS_BYTES
    logits = chunk * facts.model.padded_vocab_size / facts.tp * (LOSS_BYTES + size * is_half)
    hidden = rows * size * facts.model.hidden_size * min(2, facts.tp)
    return LOSS_BYTES * words + max(logits, size * words * is_half) + hidden


def _block_workspace(facts: Facts, tokens: int) -> float:
    """Gradients inside an MLP, of what goes into a block, and of the largest matrix."""
    m, size = facts.model, facts.bytes_per_value
    inside = (3 if m.is_gated else 2) * m.ffn_width / facts.tp
    if m.moe is not None:
        routed = m.moe.top_k * (m.hidden_size + (3 if m.is_gated else 2) * m.moe.ffn_hidden_size) / facts.tp
        inside = max(inside, routed)
    return size * (tokens * (m.hidden_size + inside) + max(_block_matrices(m, facts.tp)))


def state_bytes(scenario: Scenario, rank: int) -> StateBytes:
    """On the device, without activations: what the ZeRO paper counts."""
    return states(scenario, held_by(scenario.model, scenario.layout, spans_of(scenario, rank))).device


def optimizer_bytes_per_parameter(scenario: Scenario) -> float:
    """Of the whole model's states on one rank, beside master weights: what ZeRO then divides."""
    model, alone = scenario.model, Layout()
    held = held_by(model, alone, ((0, model.num_plan_layers),))
    whole = replace(scenario, layout=alone, zero_stage=0)
    return own_states(whole, held, held.all) / held.all
