"""A parameter of ours, the tensors of theirs that it is made of, and how: pure mappings on whole tensors.

What differs most: our query-key-value rows are one matrix grouped by key-value head, gate and up rows are one matrix,
and the experts of a layer are one tensor.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from model_providers.config import ModelConfig
from model_providers.errors import ModelError

Weights = Mapping[str, torch.Tensor]

WORDS, HEAD = "embedding.word_embeddings.weight", "head.weight"


class Join(NamedTuple):
    """Tensors of theirs that are one of ours: there and back."""

    together: Callable[[Sequence[torch.Tensor], ModelConfig], torch.Tensor]
    apart: Callable[[torch.Tensor, ModelConfig], Sequence[torch.Tensor]]


class Entry(NamedTuple):
    ours: str
    theirs: tuple[str, ...]
    join: Join


def read(entries: Iterable[Entry], weights: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Their tensors to ours."""
    ours = {}
    for entry in entries:
        missing = [name for name in entry.theirs if name not in weights]
        if missing:
            raise ModelError(
                f"weights: {missing[0]} is missing"
                + (f" (and {len(missing) - 1} more for {entry.ours})" if len(missing) > 1 else "")
                + "; the configuration beside them describes another model"
            )
        ours[entry.ours] = entry.join.together([weights[name] for name in entry.theirs], model)
    return ours


def write(entries: Iterable[Entry], weights: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Our tensors to theirs."""
    return {
        name: tensor.contiguous()
        for entry in entries
        for name, tensor in zip(entry.theirs, entry.join.apart(weights[entry.ours], model), strict=True)
    }


def join_heads(parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Query [n*d ...], key, value [g*d ...] -> [g*(n/g + 2)*d ...]: per group its queries, key and value."""
    groups, rest = model.kv_heads, parts[0].shape[1:]
    return torch.cat([rows.reshape(groups, -1, *rest) for rows in parts], dim=1).reshape(-1, *rest)


def split_heads(joined: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """The inverse of `join_heads`."""
    d, rest = model.head_width, joined.shape[1:]
    grouped = joined.reshape(model.kv_heads, -1, *rest)
    query, key, value = grouped.split([model.heads_per_group * d, d, d], dim=1)
    return query.reshape(-1, *rest), key.reshape(-1, *rest), value.reshape(-1, *rest)


def pad_rows(words: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """[v h] -> [padded v h], with zeros: the loss never sees them."""
    added = model.padded_vocab_size - words.size(0)
    return torch.cat((words, words.new_zeros(added, *words.shape[1:])))


def join_experts(parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Of each expert its matrices, one below the other: [e n h]"""
    assert model.moe is not None
    per_expert = len(parts) // model.moe.num_experts
    return torch.stack(
        [torch.cat(list(parts[e * per_expert : (e + 1) * per_expert])) for e in range(model.moe.num_experts)]
    )


def turned_rows(rows: torch.Tensor, width: int, *, back: bool = False) -> torch.Tensor:
    """[... width h] of a turned part: their pairs are neighbours, ours are half the width apart."""
    if back:
        return rows.unflatten(-2, (2, width // 2)).transpose(-3, -2).flatten(-3, -2)
    return rows.unflatten(-2, (width // 2, 2)).transpose(-3, -2).flatten(-3, -2)


def _turn_queries(tensor: torch.Tensor, model: ModelConfig, *, back: bool) -> torch.Tensor:
    """[n*(d + r) h]: the last r rows of each head"""
    assert model.mla is not None
    heads = tensor.unflatten(0, (model.num_attention_heads, model.mla.qk_head_dim))
    plain, turned = heads.split([model.mla.qk_nope_head_dim, model.mla.qk_rope_head_dim], dim=1)
    return torch.cat((plain, turned_rows(turned, turned.size(1), back=back)), dim=1).flatten(0, 1)


def _turn_keys(tensor: torch.Tensor, model: ModelConfig, *, back: bool) -> torch.Tensor:
    """[l + r h]: the last r rows"""
    assert model.mla is not None
    latent, turned = tensor.split([model.mla.kv_lora_rank, model.mla.qk_rope_head_dim])
    return torch.cat((latent, turned_rows(turned, turned.size(0), back=back)))


SAME = Join(lambda parts, model: parts[0], lambda tensor, model: (tensor,))
TRANSPOSED = Join(lambda parts, model: parts[0].t().contiguous(), lambda tensor, model: (tensor.t(),))
VOCABULARY = Join(
    lambda parts, model: pad_rows(parts[0], model), lambda tensor, model: (tensor[: model.known_vocab_size],)
)
HEADS = Join(join_heads, split_heads)
HALVES = Join(lambda parts, model: torch.cat(list(parts)), lambda joined, model: joined.chunk(2))
GATED_EXPERTS = Join(
    join_experts, lambda joined, model: [half for expert in joined for half in expert.chunk(2)]
)
EXPERTS = Join(join_experts, lambda joined, model: list(joined))
TURNED_QUERIES = Join(
    lambda parts, model: _turn_queries(parts[0], model, back=False),
    lambda tensor, model: (_turn_queries(tensor, model, back=True),),
)
TURNED_KEYS = Join(
    lambda parts, model: _turn_keys(parts[0], model, back=False),
    lambda tensor, model: (_turn_keys(tensor, model, back=True),),
)
