"""Tensors under the names of their files, from and to ours."""

from collections.abc import Callable, Collection, Iterator

import torch

from model_providers.config import ModelConfig
from model_providers.hugging_face import (
    bert_weights,
    deepseek_weights,
    entries,
    gpt2_weights,
    llama_weights,
    t5_weights,
)
from model_providers.hugging_face.architectures import Family, family
from model_providers.hugging_face.entries import HEAD, WORDS, Entry, Weights

ENTRIES: dict[Family, Callable[[ModelConfig], Iterator[Entry]]] = {
    "gpt2": gpt2_weights.entries,
    "llama": llama_weights.entries,
    "bert": bert_weights.entries,
    "megatron-bert": bert_weights.entries,
    "roberta": bert_weights.roberta_entries,
    "t5": t5_weights.entries,
    "mixtral": llama_weights.mixtral_entries,
    "qwen3_moe": llama_weights.qwen3_moe_entries,
    "deepseek_v2": deepseek_weights.entries,
    "deepseek_v3": deepseek_weights.entries,
}

# What a name begins with, and those of heads on top.
PREFIXES: dict[Family, tuple[str, tuple[str, ...]]] = {
    "gpt2": ("transformer.", ()),
    "bert": ("bert.", ("cls.",)),
    "megatron-bert": ("bert.", ("cls.",)),
    "roberta": ("roberta.", ("lm_head.",)),
}


def entries_of(model: ModelConfig) -> Iterator[Entry]:
    """Every parameter of ours, and what it is made of there."""
    return ENTRIES[family(model)](model)


def their_name(name: str, model: ModelConfig) -> str:
    """A name in one of their files as the tables have it: published files leave the model's prefix out, or name the
    parts of a norm as TensorFlow does.
    """
    prefix, heads = PREFIXES.get(family(model), ("", ()))
    if prefix and not name.startswith((prefix, *heads)):
        name = prefix + name
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        name = name.replace(old, new)
    return name


def without_heads(names: Collection[str], model: ModelConfig) -> list[Entry]:
    """The parameters of heads that files of an encoder alone do not have: all of them, or none."""
    _, heads = PREFIXES.get(family(model), ("", ()))
    if not heads or any(name.startswith(heads) for name in names):
        return []
    return [entry for entry in entries_of(model) if entry.theirs[0].startswith(heads)]


def weights_from_hugging_face(weights: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Their tensors, under the names of their files, to ours; what is tied appears under all of its names."""
    weights = {their_name(name, model): tensor for name, tensor in weights.items()}
    ours = entries.read(entries_of(model), weights, model)
    if model.tie_embeddings:
        ours[HEAD] = ours[WORDS]
    for depth in range(model.mtp.depth if model.mtp is not None else 0):
        ours[f"mtp.{depth}.word_embeddings.weight"] = ours[WORDS]
    return ours


def weights_to_hugging_face(weights: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Our whole tensors to theirs, as transformers saves them: a tied head is left out."""
    return entries.write(entries_of(model), weights, model)
