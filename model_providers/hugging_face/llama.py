"""The configurations of LlamaForCausalLM, and of Mixtral and Qwen3-MoE, which put experts in place of its MLP."""

from collections.abc import Mapping
from typing import Any

from model_providers.config import ModelConfig
from model_providers.errors import ModelError
from model_providers.hugging_face.obstacles import PLAIN, differences
from model_providers.presets import model_from

LLAMA_LIKE: dict[str, Any] = {
    "position_embedding": "rotary",
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "rotary_fraction": 1.0,
}


def obstacles(model: ModelConfig) -> list[str]:
    found = differences(model, PLAIN | LLAMA_LIKE | {"qk_norm": False})
    if model.qkv_bias and not model.linear_bias:
        found.append("qkv_bias=True")
    return found


def mixtral_obstacles(model: ModelConfig) -> list[str]:
    found = differences(model, {**PLAIN, **LLAMA_LIKE, "moe": model.moe, "qk_norm": False, "qkv_bias": False})
    return found + _expert_obstacles(model, first_dense=0, every=1, normalize_top_k=True)


def qwen3_moe_obstacles(model: ModelConfig) -> list[str]:
    found = differences(model, {**PLAIN, **LLAMA_LIKE, "moe": model.moe, "qk_norm": True})
    return found + _expert_obstacles(model, first_dense=0)


def _expert_obstacles(model: ModelConfig, **wanted: Any) -> list[str]:
    moe = model.moe
    if moe is None:
        return ["no experts"]
    plain = {"score": "softmax", "shared_ffn_hidden_size": None, "num_groups": None, "scaling_factor": 1.0}
    return [
        f"moe.{key}={getattr(moe, key)}"
        for key, value in {**plain, "capacity_factor": None, **wanted}.items()
        if getattr(moe, key) != value
    ]


def config_from(config: Mapping[str, Any]) -> ModelConfig:
    return model_from(facts_from(config))


def mixtral_from(config: Mapping[str, Any]) -> ModelConfig:
    if config.get("sliding_window"):
        raise ModelError(
            f"sliding_window={config['sliding_window']}: has no counterpart beside experts; use null"
        )
    moe = {
        "num_experts": config.get("num_local_experts", 8),
        "top_k": config.get("num_experts_per_tok", 2),
        "ffn_hidden_size": config.get("intermediate_size"),
        "aux_loss": config.get("router_aux_loss_coef", 0.0),
        "jitter": config.get("router_jitter_noise", 0.0),
    }
    return model_from(facts_from(config) | {"moe": moe})


def qwen3_moe_from(config: Mapping[str, Any]) -> ModelConfig:
    if config.get("mlp_only_layers") or config.get("use_sliding_window"):
        raise ModelError(
            "mlp_only_layers, use_sliding_window: have no counterpart here; only empty and false convert"
        )
    moe = {
        "num_experts": config.get("num_local_experts") or config.get("num_experts"),
        "top_k": config.get("num_experts_per_tok"),
        "ffn_hidden_size": config.get("moe_intermediate_size"),
        "normalize_top_k": bool(config.get("norm_topk_prob")),
        "every": config.get("decoder_sparse_step", 1),
        "global_aux_loss": config.get("router_aux_loss_coef", 0.0),
    }
    biases = {"linear_bias": False, "qkv_bias": bool(config.get("attention_bias"))}
    facts = facts_from({**config, "attention_bias": False})
    return model_from(facts | biases | {"moe": moe, "qk_norm": True})


def facts_from(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Llama and its relatives share."""
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act={config['hidden_act']}: not known here; Llama uses silu")
    if bool(config.get("attention_bias")) != bool(config.get("mlp_bias")):
        raise ModelError(
            "attention_bias and mlp_bias differ: our linear_bias is for both; convert with both or none"
        )
    rope = rope_of(config)
    return {
        "num_layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "num_attention_heads": config.get("num_attention_heads"),
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "ffn_hidden_size": config.get("intermediate_size"),
        "vocab_size": config.get("vocab_size"),
        "max_sequence_length": config.get("max_position_embeddings", 2048),
        "position_embedding": "rotary",
        "rotary_base": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        "rope_scaling": _rope_scaling(rope),
        "normalization": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": "swiglu",
        "linear_bias": bool(config.get("attention_bias")),
        "tie_embeddings": bool(config.get("tie_word_embeddings")),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "init_std": config.get("initializer_range", 0.02),
    }


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 says rope_parameters; before, rope_scaling beside rope_theta."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    same = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": (
            "factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    }
    if kind not in same:
        raise ModelError(f"rope_type={kind}: not known here; convertible are default, {', '.join(same)}")
    facts = {key: rope[key] for key in same[kind] if rope.get(key) is not None}
    if kind != "linear":
        facts["original_max_positions"] = rope["original_max_position_embeddings"]
    return {"kind": kind, **facts}


def config_to(model: ModelConfig) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **facts_to(model)}


def mixtral_to(model: ModelConfig) -> dict[str, Any]:
    assert model.moe is not None
    return {
        **facts_to(model),
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": model.moe.ffn_hidden_size,
        "num_local_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k,
        "router_aux_loss_coef": model.moe.aux_loss,
        "router_jitter_noise": model.moe.jitter,
        "sliding_window": None,
    }


def qwen3_moe_to(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    assert moe is not None
    return {
        **facts_to(model),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": model.qkv_bias,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize_top_k,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": [],
        "router_aux_loss_coef": moe.global_aux_loss,
        "use_sliding_window": False,
    }


def facts_to(model: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        rope = {key: value for key, value in model.rope_scaling.model_dump().items() if value is not None}
        rope["rope_type"] = rope.pop("kind")
        if "original_max_positions" in rope:
            rope["original_max_position_embeddings"] = rope.pop("original_max_positions")
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": None if model.mla is not None else model.head_width,
        "intermediate_size": model.ffn_width,
        "vocab_size": model.known_vocab_size,
        "max_position_embeddings": model.max_sequence_length,
        "rope_parameters": rope | {"rope_theta": model.rotary_base},
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "attention_bias": model.linear_bias,
        "mlp_bias": model.linear_bias,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
    }
