"""The configuration of T5ForConditionalGeneration."""

from collections.abc import Mapping
from typing import Any

from model_providers.config import ModelConfig
from model_providers.errors import ModelError
from model_providers.hugging_face.obstacles import PLAIN, differences
from model_providers.presets import model_from

ACTIVATIONS = {
    "relu": "relu",
    "gated-gelu": "geglu_tanh",
    "gated-silu": "swiglu",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
T5_LIKE: dict[str, Any] = {
    "position_embedding": "relative",
    "normalization": "rmsnorm",
    "linear_bias": False,
    "qkv_bias": False,
    "qk_norm": False,
}


def obstacles(model: ModelConfig) -> list[str]:
    t5 = model.t5
    if t5 is None:
        return ["no encoder beside the decoder"]
    found = differences(model, {**PLAIN, **T5_LIKE, "t5": t5})
    if model.activation not in ACTIVATIONS.values():
        found.append(f"activation={model.activation}")
    if t5.scaled_scores:
        found.append("t5.scaled_scores=True")
    if model.tie_embeddings and not t5.scaled_output:
        found.append("t5.scaled_output=False")
    return found


def config_from(config: Mapping[str, Any]) -> ModelConfig:
    projection = config.get("feed_forward_proj", "relu")
    if projection not in ACTIVATIONS:
        raise ModelError(
            f"feed_forward_proj={projection}: not known here; convertible are {', '.join(ACTIVATIONS)}"
        )
    dropout = config.get("dropout_rate", 0.0)
    # transformers 5 says only whether the head's input is scaled, which goes with a head that is the embedding.
    is_tied = bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)))
    return model_from(
        {
            "num_layers": config.get("num_decoder_layers") or config.get("num_layers"),
            "hidden_size": config.get("d_model"),
            "num_attention_heads": config.get("num_heads"),
            "head_dim": config.get("d_kv"),
            "ffn_hidden_size": config.get("d_ff"),
            "vocab_size": config.get("vocab_size"),
            "max_sequence_length": config.get("n_positions", 512),
            "normalization": "rmsnorm",
            "norm_eps": config.get("layer_norm_epsilon", 1e-6),
            "activation": ACTIVATIONS[projection],
            "position_embedding": "relative",
            "tie_embeddings": is_tied,
            "hidden_dropout": dropout,
            "attention_dropout": dropout,
            "scale_residual_init": False,
            "t5": {
                "num_encoder_layers": config.get("num_layers"),
                "relative_buckets": config.get("relative_attention_num_buckets", 32),
                "relative_max_distance": config.get("relative_attention_max_distance", 128),
            },
        }
    )


def config_to(model: ModelConfig) -> dict[str, Any]:
    t5 = model.t5
    assert t5 is not None
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": model.hidden_size,
        "d_kv": model.head_width,
        "d_ff": model.ffn_width,
        "num_layers": t5.num_encoder_layers,
        "num_decoder_layers": model.num_layers,
        "num_heads": model.num_attention_heads,
        "vocab_size": model.known_vocab_size,
        "n_positions": model.max_sequence_length,
        "relative_attention_num_buckets": t5.relative_buckets,
        "relative_attention_max_distance": t5.relative_max_distance,
        "layer_norm_epsilon": model.norm_eps,
        "feed_forward_proj": names[model.activation],
        "dropout_rate": model.hidden_dropout,
        "tie_word_embeddings": model.tie_embeddings,
        "is_encoder_decoder": True,
    }
