"""The configurations of DeepseekV2ForCausalLM and DeepseekV3ForCausalLM."""

from collections.abc import Mapping
from typing import Any

from model_providers.config import ModelConfig
from model_providers.hugging_face.llama import LLAMA_LIKE, facts_from, facts_to
from model_providers.hugging_face.obstacles import PLAIN, differences
from model_providers.presets import model_from

GROUP_SCORE_EXPERTS = 2  # whose scores add up to a group's in theirs; megatron-core takes top_k / group_top_k


def v3_obstacles(model: ModelConfig) -> list[str]:
    found = _obstacles(model)
    moe = model.moe
    if moe is not None:
        found += [] if moe.score == "sigmoid" else [f"moe.score={moe.score}"]
        if moe.num_groups is not None and moe.top_k != GROUP_SCORE_EXPERTS * (moe.group_top_k or 1):
            found.append(f"moe.top_k={moe.top_k} that is not twice moe.group_top_k={moe.group_top_k}")
    return found


def v2_obstacles(model: ModelConfig) -> list[str]:
    found = _obstacles(model) + differences(model, {"mtp": None})
    moe = model.moe
    if moe is not None:
        wanted = {"score": "softmax", "num_groups": None, "normalize_top_k": False}
        found += [
            f"moe.{key}={getattr(moe, key)}" for key, value in wanted.items() if getattr(moe, key) != value
        ]
    return found


def _obstacles(model: ModelConfig) -> list[str]:
    found = differences(
        model,
        {**PLAIN, **LLAMA_LIKE, "moe": model.moe, "mla": model.mla, "mtp": model.mtp, "linear_bias": False},
    )
    moe = model.moe
    if moe is None or model.mla is None:
        return [*found, "no experts" if moe is None else "no latent attention"]
    shared = moe.shared_ffn_hidden_size
    if shared is None or shared % moe.ffn_hidden_size:
        found.append(f"moe.shared_ffn_hidden_size={shared}")
    wanted = {"every": 1, "shared_gate": False, "capacity_factor": None}
    return found + [
        f"moe.{key}={getattr(moe, key)}" for key, value in wanted.items() if getattr(moe, key) != value
    ]


def v3_from(config: Mapping[str, Any]) -> ModelConfig:
    groups = config.get("n_group") or 1
    more = {
        "score": "sigmoid",
        "bias_update_rate": 0.001,  # DeepSeek-V3, section 4.2; the configuration does not say
        "num_groups": groups if groups > 1 else None,
        "group_top_k": config.get("topk_group") if groups > 1 else None,
        "normalize_top_k": bool(config.get("norm_topk_prob", True)),
    }
    depth = config.get("num_nextn_predict_layers") or 0
    return model_from(_facts_from(config, more) | {"mtp": {"depth": depth} if depth else None})


def v2_from(config: Mapping[str, Any]) -> ModelConfig:
    return model_from(_facts_from(config, {"normalize_top_k": False}))


def _facts_from(config: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    width = config["moe_intermediate_size"]
    moe = {
        "num_experts": config["n_routed_experts"],
        "top_k": config["num_experts_per_tok"],
        "ffn_hidden_size": width,
        "shared_ffn_hidden_size": width * config["n_shared_experts"],
        "first_dense": config.get("first_k_dense_replace", 0),
        "scaling_factor": config.get("routed_scaling_factor", 1.0),
        **more,
    }
    mla = {
        key: config[key]
        for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    }
    facts = facts_from({**config, "attention_bias": False, "mlp_bias": False})
    return facts | {"head_dim": None, "num_kv_heads": None, "moe": moe, "mla": mla}


def v3_to(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    assert moe is not None
    return _facts_to(model) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "n_group": moe.num_groups or 1,
        "topk_group": moe.group_top_k or 1,
        "norm_topk_prob": moe.normalize_top_k,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": model.mtp.depth if model.mtp is not None else 0,
        "rope_interleave": True,
    }


def v2_to(model: ModelConfig) -> dict[str, Any]:
    return _facts_to(model) | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "topk_method": "greedy",
        "norm_topk_prob": False,
    }


def _facts_to(model: ModelConfig) -> dict[str, Any]:
    moe, mla = model.moe, model.mla
    assert moe is not None and mla is not None and moe.shared_ffn_hidden_size is not None
    facts = facts_to(model)
    del facts["head_dim"]
    return {
        **facts,
        **mla.model_dump(),
        "moe_intermediate_size": moe.ffn_hidden_size,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_ffn_hidden_size // moe.ffn_hidden_size,
        "num_experts_per_tok": moe.top_k,
        "first_k_dense_replace": moe.first_dense,
        "routed_scaling_factor": moe.scaling_factor,
    }
