"""The configurations of BertForPreTraining, RobertaForMaskedLM and MegatronBertForPreTraining."""

from collections.abc import Mapping
from typing import Any

from model_providers.config import ModelConfig
from model_providers.errors import ModelError
from model_providers.hugging_face.obstacles import PLAIN, differences
from model_providers.presets import model_from

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
BERT_LIKE: dict[str, Any] = {
    "position_embedding": "learned",
    "normalization": "layernorm",
    "linear_bias": True,
    "qk_norm": False,
    "num_kv_heads": None,
}
FIRST_POSITION = 2  # RoBERTa counts positions from the padding's number on


def obstacles(model: ModelConfig) -> list[str]:
    return _obstacles(model, token_types=2, sentence_head=True, norm="post")


def megatron_obstacles(model: ModelConfig) -> list[str]:
    return _obstacles(model, token_types=2, sentence_head=True, norm="pre")


def roberta_obstacles(model: ModelConfig) -> list[str]:
    return _obstacles(model, token_types=1, sentence_head=False, norm="post")


def _obstacles(model: ModelConfig, **wanted: Any) -> list[str]:
    bert = model.bert
    if bert is None:
        return ["no bidirectional attention"]
    found = differences(model, {**PLAIN, **BERT_LIKE, "bert": bert})
    if model.num_kv_heads == model.num_attention_heads:
        found = [fault for fault in found if not fault.startswith("num_kv_heads")]
    if model.activation not in ACTIVATIONS.values():
        found.append(f"activation={model.activation}")
    if model.head_width * model.num_attention_heads != model.hidden_size:
        found.append(f"head_dim={model.head_dim}")
    return found + [
        f"bert.{key}={getattr(bert, key)}" for key, value in wanted.items() if getattr(bert, key) != value
    ]


def config_from(config: Mapping[str, Any]) -> ModelConfig:
    return model_from(_facts_from(config) | {"bert": {"token_types": 2, "sentence_head": True}})


def megatron_from(config: Mapping[str, Any]) -> ModelConfig:
    return model_from(
        _facts_from(config) | {"bert": {"token_types": 2, "sentence_head": True, "norm": "pre"}}
    )


def roberta_from(config: Mapping[str, Any]) -> ModelConfig:
    facts = _facts_from(config)
    facts["max_sequence_length"] -= FIRST_POSITION
    return model_from(facts | {"bert": {"token_types": 1, "sentence_head": False}})


def _facts_from(config: Mapping[str, Any]) -> dict[str, Any]:
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ModelError(f"hidden_act={activation}: not known here; convertible are {', '.join(ACTIVATIONS)}")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ModelError(
            f"position_embedding_type={config['position_embedding_type']}: not known here; only absolute converts"
        )
    return {
        "num_layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "num_attention_heads": config.get("num_attention_heads"),
        "ffn_hidden_size": config.get("intermediate_size"),
        "vocab_size": config.get("vocab_size"),
        "max_sequence_length": config.get("max_position_embeddings", 512),
        "position_embedding": "learned",
        "normalization": "layernorm",
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "activation": ACTIVATIONS[activation],
        "linear_bias": True,
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
        "hidden_dropout": config.get("hidden_dropout_prob", 0.0),
        "attention_dropout": config.get("attention_probs_dropout_prob", 0.0),
        "init_std": config.get("initializer_range", 0.02),
        "scale_residual_init": False,
    }


def config_to(model: ModelConfig) -> dict[str, Any]:
    return {
        **_facts_to(model),
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
        "type_vocab_size": 2,
    }


def megatron_to(model: ModelConfig) -> dict[str, Any]:
    kind = {"architectures": ["MegatronBertForPreTraining"], "model_type": "megatron-bert"}
    return {**_facts_to(model), **kind, "type_vocab_size": 2}


def roberta_to(model: ModelConfig) -> dict[str, Any]:
    return {
        **_facts_to(model),
        "architectures": ["RobertaForMaskedLM"],
        "model_type": "roberta",
        "type_vocab_size": 1,
        "max_position_embeddings": model.max_sequence_length + FIRST_POSITION,
        "pad_token_id": FIRST_POSITION - 1,
    }


def _facts_to(model: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_width,
        "vocab_size": model.known_vocab_size,
        "max_position_embeddings": model.max_sequence_length,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": names[model.activation],
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "initializer_range": model.init_std,
        "position_embedding_type": "absolute",
    }
