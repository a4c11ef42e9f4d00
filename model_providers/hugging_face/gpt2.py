"""GPT2LMHeadModel: its configuration and its tensors, whose linears are transposed (Conv1D) and joined by thirds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from model_providers.config import ModelConfig
from model_providers.errors import ModelError
from model_providers.hugging_face.entries import (
    SAME,
    TRANSPOSED,
    VOCABULARY,
    WORDS,
    Entry,
    Join,
    join_heads,
    split_heads,
)
from model_providers.hugging_face.obstacles import PLAIN, differences
from model_providers.presets import model_from

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
NORMS = {"ln_1": "input_layernorm", "ln_2": "pre_mlp_layernorm"}
LINEARS = {
    "attn.c_attn": "self_attention.linear_qkv",
    "attn.c_proj": "self_attention.linear_proj",
    "mlp.c_fc": "mlp.linear_fc1",
    "mlp.c_proj": "mlp.linear_fc2",
}


def _heads_from_thirds(parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    return join_heads(parts[0].chunk(3), model)


def _thirds_from_heads(tensor: torch.Tensor, model: ModelConfig) -> Sequence[torch.Tensor]:
    return (torch.cat(split_heads(tensor, model)),)


THIRDS = Join(_heads_from_thirds, _thirds_from_heads)
TRANSPOSED_THIRDS = Join(
    lambda parts, model: _heads_from_thirds([parts[0].t()], model).contiguous(),
    lambda tensor, model: (_thirds_from_heads(tensor, model)[0].t(),),
)


def obstacles(model: ModelConfig) -> list[str]:
    wanted = PLAIN | {"position_embedding": "learned", "normalization": "layernorm", "linear_bias": True}
    found = differences(model, wanted | {"tie_embeddings": True, "qk_norm": False})
    if model.activation not in ACTIVATIONS.values():
        found.append(f"activation={model.activation}")
    if model.kv_heads != model.num_attention_heads or model.query_width != model.hidden_size:
        found.append("heads that do not fill hidden_size")
    return found


def config_from(config: Mapping[str, Any]) -> ModelConfig:
    activation = config.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"activation_function={activation}: not known here; choose one of {', '.join(ACTIVATIONS)}"
        )
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(key):
            raise ModelError(f"{key}={config[key]}: has no counterpart here; only False converts")
    return model_from(
        {
            "num_layers": config.get("n_layer"),
            "hidden_size": config.get("n_embd"),
            "num_attention_heads": config.get("n_head"),
            "ffn_hidden_size": config.get("n_inner"),
            "vocab_size": config.get("vocab_size"),
            "max_sequence_length": config.get("n_positions", 1024),
            "position_embedding": "learned",
            "normalization": "layernorm",
            "norm_eps": config.get("layer_norm_epsilon", 1e-5),
            "activation": ACTIVATIONS[activation],
            "linear_bias": True,
            "tie_embeddings": True,
            "hidden_dropout": config.get("resid_pdrop", 0.1),
            "attention_dropout": config.get("attn_pdrop", 0.1),
            "init_std": config.get("initializer_range", 0.02),
        }
    )


def config_to(model: ModelConfig) -> dict[str, Any]:
    activation = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[model.activation]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_width,
        "n_positions": model.max_sequence_length,
        "vocab_size": model.known_vocab_size,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": activation,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": model.init_std,
        "tie_word_embeddings": True,
    }


def entries(model: ModelConfig) -> Iterator[Entry]:
    yield Entry(WORDS, ("transformer.wte.weight",), VOCABULARY)
    yield Entry("embedding.position_embeddings.weight", ("transformer.wpe.weight",), SAME)
    for part in ("weight", "bias"):
        yield Entry(f"final_norm.norm.{part}", (f"transformer.ln_f.{part}",), SAME)
    for layer in range(model.num_layers):
        for part in ("weight", "bias"):
            for theirs, ours in NORMS.items():
                yield Entry(
                    f"layers.{layer}.{ours}.{part}", (f"transformer.h.{layer}.{theirs}.{part}",), SAME
                )
            for theirs, ours in LINEARS.items():
                name = f"transformer.h.{layer}.{theirs}.{part}"
                yield Entry(f"layers.{layer}.{ours}.{part}", (name,), _join(theirs, part))


def _join(theirs: str, part: str) -> Join:
    if theirs == "attn.c_attn":
        return TRANSPOSED_THIRDS if part == "weight" else THIRDS
    return TRANSPOSED if part == "weight" else SAME
