"""GPT2LMHeadModel's configuration."""

from collections.abc import Mapping
from typing import Any

from model_providers.config import ModelConfig
from model_providers.errors import ModelError
from model_providers.hugging_face.obstacles import PLAIN, differences
from model_providers.presets import model_from

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


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
