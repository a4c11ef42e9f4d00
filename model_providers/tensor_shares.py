"""What one rank of a layer's tensor and expert groups holds of its parameters.

Not everything is cut: norms, biases that are added after a sum over the ranks, routers, learned positions and latent
down projections are whole on every tensor rank.  Which ones, is said by the marks on the built parameters
(logical.py); a test compares.
"""

from functools import lru_cache
from typing import NamedTuple

from model_providers.config import ModelConfig
from model_providers.cost import layer_costs, norm_parameters, word_parameters
from model_providers.fp8.config import Fp8Config


class LayerShare(NamedTuple):
    """Elements of one layer on one rank."""

    dense: int
    experts: int  # routed ones, which ep and etp share out
    small: int  # of ``dense``: in tensors that ZeRO-3 does not cut up (norms, biases)
    is_checkpointable: bool  # forgotten under full recompute
    reads_words: bool  # ties the table of words, which a rank without the embedding then holds a copy of

    @property
    def all(self) -> int:
        return self.dense + self.experts


@lru_cache(maxsize=256)
def layer_shares(model: ModelConfig, *, tp: int = 1, ep: int = 1, etp: int = 1) -> tuple[LayerShare, ...]:
    """In the order of the plan; shared words count in the embedding."""
    costs = layer_costs(model, 1)
    whole = _whole_parameters(model)
    small = [
        elements - large for elements, large in zip(whole, _whole_matrices(model, len(costs)), strict=True)
    ]
    checkpointable, readers = set(blocks(model)), _readers_of_words(model)
    return tuple(
        LayerShare(
            dense=whole[index] + (cost.parameters - cost.expert_parameters - whole[index]) // tp,
            experts=cost.expert_parameters // (ep * etp),
            small=small[index],
            is_checkpointable=index in checkpointable,
            reads_words=index in readers,
        )
        for index, cost in enumerate(costs)
    )


def word_share(model: ModelConfig, tp: int) -> int:
    return word_parameters(model) // tp


def blocks(model: ModelConfig) -> list[int]:
    """Places in the plan of transformer layers, those that look ahead included."""
    depth = model.mtp.depth if model.mtp is not None else 0
    if model.t5 is not None:
        encoders = model.t5.num_encoder_layers
        return [*range(1, encoders + 1), *range(encoders + 3, encoders + 3 + model.num_layers)]
    if model.electra is not None:
        first = model.electra.generator_layers + 2
        return [*range(1, first - 1), *range(first, first + model.num_layers)]
    ahead = model.num_layers + (1 if model.norms_after else 2)
    return [*range(1, model.num_layers + 1), *range(ahead, ahead + depth)]


@lru_cache(maxsize=1024)
def fp8_places(model: ModelConfig, fp8: Fp8Config) -> tuple[int, ...]:
    """Places in the plan of the blocks that run in FP8; each stack has a bottom and a top, and nothing looks ahead."""
    stacks = [model.num_layers]
    if model.t5 is not None:
        stacks.insert(0, model.t5.num_encoder_layers)
    if model.electra is not None:
        stacks.insert(0, model.electra.generator_layers)
    inside = [fp8.is_fp8_block(index, depth) for depth in stacks for index in range(depth)]
    return tuple(place for place, is_inside in zip(blocks(model), inside, strict=False) if is_inside)


def _readers_of_words(model: ModelConfig) -> set[int]:
    """Layers that tie the table of words, from the plans of gpt.py, bert.py, electra.py and t5.py."""
    last = model.num_plan_layers - 1
    readers = {last} if model.tie_embeddings and model.electra is None else set()
    if model.t5 is not None:
        readers.add(model.t5.num_encoder_layers + 2)
    if model.electra is not None:
        readers.add(model.electra.generator_layers + 1)
    if model.mtp is not None:
        readers |= set(range(last - model.mtp.depth, last))
    return readers


def _whole_parameters(model: ModelConfig) -> list[int]:
    """Of each layer, the elements that every tensor rank holds."""
    h = model.hidden_size
    norm = norm_parameters(model, h)
    if model.electra is not None:
        return _whole_of_electra(model, norm)
    blocks_ = [_whole_of_block(model, has_experts=model.has_experts(i)) for i in range(model.num_layers)]
    if model.t5 is not None:
        reading = norm + (h if model.linear_bias else 0)
        encoder = [_whole_of_block(model, has_experts=False)] * model.t5.num_encoder_layers
        return [0, *encoder, norm, 0, *(block + reading for block in blocks_), norm, 0]
    ahead = model.mtp.depth if model.mtp is not None else 0
    looking = _whole_of_block(model, has_experts=model.moe is not None) + 3 * norm
    final = [] if model.norms_after else [norm]
    return [_whole_of_embedding(model), *blocks_, *final, *[looking] * ahead, _whole_of_head(model)]


def _whole_of_embedding(model: ModelConfig) -> int:
    h = model.hidden_size
    whole = model.max_sequence_length * h if model.position_embedding == "learned" else 0
    if model.bert is not None:
        whole += model.bert.token_types * h + (norm_parameters(model, h) if model.norms_after else 0)
    return whole


def _whole_of_head(model: ModelConfig) -> int:
    if model.bert is None:
        return 0
    h = model.hidden_size
    pooler = h * h + h + 2 * h + 2 if model.bert.sentence_head else 0
    return h * h + h + norm_parameters(model, h) + pooler


def _whole_of_electra(model: ModelConfig, norm: int) -> list[int]:
    h, small = model.hidden_size, model.generator
    g = small.hidden_size
    positions = model.max_sequence_length * h if model.position_embedding == "learned" else 0
    final = [] if model.norms_after else [norm]
    return [
        positions + norm + h * g + g,
        *[_whole_of_block(small, has_experts=False)] * small.num_layers,
        g * h + h + 2 * norm,
        *[_whole_of_block(model, has_experts=False)] * model.num_layers,
        *final,
        h * h + h + h + 1,
    ]


def _whole_of_block(model: ModelConfig, *, has_experts: bool) -> int:
    """Norms, the biases behind sums over the ranks, latent down projections, the router and its gate."""
    h, mla = model.hidden_size, model.mla
    whole = 2 * norm_parameters(model, h) + (h if model.linear_bias else 0)
    if model.qk_norm and mla is None:
        whole += 2 * norm_parameters(model, model.head_width)
    if mla is not None:
        ranks = [rank for rank in (mla.q_lora_rank, mla.kv_lora_rank) if rank is not None]
        whole += sum(h * rank + norm_parameters(model, rank) for rank in ranks) + h * mla.qk_rope_head_dim
    if not has_experts:
        return whole + (h if model.linear_bias else 0)
    moe = model.moe
    assert moe is not None
    shared_bias = h if model.linear_bias and moe.shared_ffn_hidden_size else 0
    return whole + h * moe.num_experts + (h if moe.shared_gate else 0) + shared_bias


def _whole_matrices(model: ModelConfig, num_layers: int) -> list[int]:
    """Of `_whole_parameters`, those in matrices of more than ten rows, which ZeRO-3 cuts over the copies of the model.

    Ten times the width is Megaloom's meaning of an "auto" stage3_param_persistence_threshold (pretrain/ds_config.py).
    """
    h, mla, moe = model.hidden_size, model.mla, model.moe
    large = [0] * num_layers
    if model.position_embedding == "learned":
        large[0] += model.max_sequence_length * h
    if model.bert is not None and model.electra is None:
        large[-1] += (1 + bool(model.bert.sentence_head)) * h * h
    for index in blocks(model):
        if mla is not None:
            large[index] += h * (mla.kv_lora_rank + mla.qk_rope_head_dim + (mla.q_lora_rank or 0))
        if moe is not None and moe.num_experts > 10:
            large[index] += h * moe.num_experts if _has_experts_at(model, index) else 0
    return large


def _has_experts_at(model: ModelConfig, index: int) -> bool:
    return model.has_experts(index - 1) if index <= model.num_layers else True
