"""Weights of Hugging Face's GPT2LMHeadModel and LlamaForCausalLM, from and to ours.

Pure mappings on dicts of whole tensors (see logical.py for shards); transformers is not imported.  Three
things differ: our query-key-value rows are one matrix grouped by key-value head, our gate and up rows are one
matrix, and GPT-2 keeps its linears transposed (Conv1D).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from model_providers.config import ModelConfig
from model_providers.hugging_face_config import Family, family

Weights = Mapping[str, torch.Tensor]

GPT2_NORMS = {"ln_1": "input_layernorm", "ln_2": "pre_mlp_layernorm"}
GPT2_LINEARS = {
    "attn.c_attn": "self_attention.linear_qkv",
    "attn.c_proj": "self_attention.linear_proj",
    "mlp.c_fc": "mlp.linear_fc1",
    "mlp.c_proj": "mlp.linear_fc2",
}
LLAMA_NORMS = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"}
LLAMA_LINEARS = {"self_attn.o_proj": "self_attention.linear_proj", "mlp.down_proj": "mlp.linear_fc2"}


def weights_from_hugging_face(weights: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Their state dict to ours, whole tensors; a tied head appears under both of its names."""
    ours = STATE_DICTS[family(model)].read(weights, model)
    words = ours["embedding.word_embeddings.weight"] = _pad_rows(
        ours["embedding.word_embeddings.weight"], model
    )
    ours["head.weight"] = words if model.tie_embeddings else _pad_rows(ours["head.weight"], model)
    return ours


def weights_to_hugging_face(weights: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Our whole tensors to their state dict; a tied head is left out, as transformers saves it."""
    return STATE_DICTS[family(model)].write(weights, model)


def _weights_from_gpt2(weights: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    # Published files have the names with and without "transformer." in front.
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    ours = {
        "embedding.word_embeddings.weight": theirs["wte.weight"],
        "embedding.position_embeddings.weight": theirs["wpe.weight"],
        "final_norm.norm.weight": theirs["ln_f.weight"],
        "final_norm.norm.bias": theirs["ln_f.bias"],
    }
    for layer in range(model.num_layers):
        for part in ("weight", "bias"):
            for their_name, our_name in GPT2_NORMS.items():
                ours[f"layers.{layer}.{our_name}.{part}"] = theirs[f"h.{layer}.{their_name}.{part}"]
            for their_name, our_name in GPT2_LINEARS.items():
                tensor = theirs[f"h.{layer}.{their_name}.{part}"]
                tensor = tensor.t() if part == "weight" else tensor  # Conv1D: [in out] -> [out in]
                if their_name == "attn.c_attn":
                    tensor = HEADS.together(tensor.chunk(3), model)
                ours[f"layers.{layer}.{our_name}.{part}"] = tensor.contiguous()
    return ours


def _weights_to_gpt2(weights: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    theirs = {
        "transformer.wte.weight": weights["embedding.word_embeddings.weight"][: model.known_vocab_size],
        "transformer.wpe.weight": weights["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": weights["final_norm.norm.weight"],
        "transformer.ln_f.bias": weights["final_norm.norm.bias"],
    }
    for layer in range(model.num_layers):
        for part in ("weight", "bias"):
            for their_name, our_name in GPT2_NORMS.items():
                theirs[f"transformer.h.{layer}.{their_name}.{part}"] = weights[
                    f"layers.{layer}.{our_name}.{part}"
                ]
            for their_name, our_name in GPT2_LINEARS.items():
                tensor = weights[f"layers.{layer}.{our_name}.{part}"]
                if their_name == "attn.c_attn":
                    tensor = torch.cat(HEADS.apart(tensor, model))
                tensor = tensor.t() if part == "weight" else tensor
                theirs[f"transformer.h.{layer}.{their_name}.{part}"] = tensor.contiguous()
    return theirs


def _weights_from_llama(weights: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    ours = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "final_norm.norm.weight": weights["model.norm.weight"],
    }
    if not model.tie_embeddings:
        ours["head.weight"] = weights["lm_head.weight"]
    for layer in range(model.num_layers):
        there, here = f"model.layers.{layer}", f"layers.{layer}"
        for their_name, our_name in LLAMA_NORMS.items():
            ours[f"{here}.{our_name}.weight"] = weights[f"{there}.{their_name}.weight"]
        for part in ("weight", "bias") if model.linear_bias else ("weight",):
            for their_name, our_name in LLAMA_LINEARS.items():
                ours[f"{here}.{our_name}.{part}"] = weights[f"{there}.{their_name}.{part}"]
            for our_name, (join, names) in LLAMA_JOINED.items():
                parts = [weights[f"{there}.{name}.{part}"] for name in names]
                ours[f"{here}.{our_name}.{part}"] = join.together(parts, model)
    return ours


def _weights_to_llama(weights: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    rows = model.known_vocab_size
    theirs = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:rows],
        "model.norm.weight": weights["final_norm.norm.weight"],
    }
    if not model.tie_embeddings:
        theirs["lm_head.weight"] = weights["head.weight"][:rows]
    for layer in range(model.num_layers):
        there, here = f"model.layers.{layer}", f"layers.{layer}"
        for their_name, our_name in LLAMA_NORMS.items():
            theirs[f"{there}.{their_name}.weight"] = weights[f"{here}.{our_name}.weight"]
        for part in ("weight", "bias") if model.linear_bias else ("weight",):
            for their_name, our_name in LLAMA_LINEARS.items():
                theirs[f"{there}.{their_name}.{part}"] = weights[f"{here}.{our_name}.{part}"]
            for our_name, (join, names) in LLAMA_JOINED.items():
                parts = join.apart(weights[f"{here}.{our_name}.{part}"], model)
                theirs |= {
                    f"{there}.{name}.{part}": value.contiguous()
                    for name, value in zip(names, parts, strict=True)
                }
    return theirs


def join_heads(parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Query [n*d ...], key, value [g*d ...] -> [g*(n/g + 2)*d ...]: per group its queries, key and value."""
    groups, rest = model.kv_heads, parts[0].shape[1:]
    return torch.cat([rows.reshape(groups, -1, *rest) for rows in parts], dim=1).reshape(-1, *rest)


def split_heads(joined: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """The inverse of ``join_heads``."""
    d, rest = model.head_width, joined.shape[1:]
    grouped = joined.reshape(model.kv_heads, -1, *rest)
    query, key, value = grouped.split([model.heads_per_group * d, d, d], dim=1)
    return query.reshape(-1, *rest), key.reshape(-1, *rest), value.reshape(-1, *rest)


def _pad_rows(words: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """[v h] -> [padded v h], with zeros: the loss never sees them."""
    added = model.padded_vocab_size - words.size(0)
    return torch.cat((words, words.new_zeros(added, *words.shape[1:])))


class Join(NamedTuple):
    """Matrices of theirs that are one of ours: there and back."""

    together: Callable[[Sequence[torch.Tensor], ModelConfig], torch.Tensor]
    apart: Callable[[torch.Tensor, ModelConfig], tuple[torch.Tensor, ...]]


HEADS = Join(join_heads, split_heads)
HALVES = Join(lambda parts, model: torch.cat(list(parts)), lambda joined, model: joined.chunk(2))

LLAMA_JOINED = {
    "self_attention.linear_qkv": (HEADS, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "mlp.linear_fc1": (HALVES, ("mlp.gate_proj", "mlp.up_proj")),
}


class StateDictMap(NamedTuple):
    """The state dict of one architecture, in both directions."""

    read: Callable[[Weights, ModelConfig], dict[str, torch.Tensor]]
    write: Callable[[Weights, ModelConfig], dict[str, torch.Tensor]]


STATE_DICTS: dict[Family, StateDictMap] = {
    "gpt2": StateDictMap(_weights_from_gpt2, _weights_to_gpt2),
    "llama": StateDictMap(_weights_from_llama, _weights_to_llama),
}
