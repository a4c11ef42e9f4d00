"""Tensors under the names of their files, from and to ours."""

from collections.abc import Callable, Iterator

import torch

from model_providers.config import ModelConfig
from model_providers.hugging_face import deepseek_weights, entries, gpt2_weights, llama_weights
from model_providers.hugging_face.architectures import Family, family
from model_providers.hugging_face.entries import HEAD, WORDS, Entry, Weights

ENTRIES: dict[Family, Callable[[ModelConfig], Iterator[Entry]]] = {
    "gpt2": gpt2_weights.entries,
    "llama": llama_weights.entries,
    "mixtral": llama_weights.mixtral_entries,
    "qwen3_moe": llama_weights.qwen3_moe_entries,
    "deepseek_v2": deepseek_weights.entries,
    "deepseek_v3": deepseek_weights.entries,
}


def entries_of(model: ModelConfig) -> Iterator[Entry]:
    """Every parameter of ours, and what it is made of there."""
    return ENTRIES[family(model)](model)


def their_name(name: str, model: ModelConfig) -> str:
    """A name in one of their files; GPT-2's published ones have it with and without "transformer." in front."""
    return f"transformer.{name.removeprefix('transformer.')}" if family(model) == "gpt2" else name


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
