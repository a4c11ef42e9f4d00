"""DeepseekV2ForCausalLM and DeepseekV3ForCausalLM: latent attention, shared experts, and layers that look ahead.

Two things to know.  Their turned dimensions are paired with their neighbours, ours half a width apart; rows are put
in order on the way.  And transformers leaves out what looks ahead; the released files have it as further layers, with
copies of embedding and head.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from model_providers.config import ModelConfig
from model_providers.hugging_face.entries import (
    HEAD,
    SAME,
    TURNED_KEYS,
    TURNED_QUERIES,
    VOCABULARY,
    WORDS,
    Entry,
)
from model_providers.hugging_face.llama import (
    LIST_OF_EXPERTS,
    LLAMA_LIKE,
    ends,
    expert_entries,
    facts_from,
    facts_to,
    mlp,
    norms,
)
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


def entries(model: ModelConfig) -> Iterator[Entry]:
    yield from ends(model)
    for layer in range(model.num_layers):
        yield from _block(f"model.layers.{layer}", f"layers.{layer}", model, model.has_experts(layer))
    for depth in range(model.mtp.depth if model.mtp is not None else 0):
        there, here = f"model.layers.{model.num_layers + depth}", f"mtp.{depth}"
        yield Entry(WORDS, (f"{there}.embed_tokens.weight",), VOCABULARY)
        head = WORDS if model.tie_embeddings else HEAD
        yield Entry(head, (f"{there}.shared_head.head.weight",), VOCABULARY)
        for ours, theirs in (
            ("enorm", "enorm"),
            ("hnorm", "hnorm"),
            ("eh_proj", "eh_proj"),
            ("final_layernorm", "shared_head.norm"),
        ):
            yield Entry(f"{here}.{ours}.weight", (f"{there}.{theirs}.weight",), SAME)
        yield from _block(there, f"{here}.transformer_layer", model, model.moe is not None)


def _block(there: str, here: str, model: ModelConfig, has_experts: bool) -> Iterator[Entry]:
    yield from norms(there, here)
    yield from _attention(f"{there}.self_attn", f"{here}.self_attention", model)
    if not has_experts:
        yield from mlp(f"{there}.mlp", f"{here}.mlp", model)
        return
    router, experts, names = LIST_OF_EXPERTS
    yield from expert_entries(f"{there}.{router}", f"{there}.{experts}", f"{here}.mlp", names, model)
    yield from mlp(f"{there}.mlp.shared_experts", f"{here}.mlp.shared_experts", model)
    if model.moe is not None and model.moe.balances_by_bias:
        yield Entry(f"{here}.mlp.router.expert_bias", (f"{there}.{router}.e_score_correction_bias",), SAME)


def _attention(there: str, here: str, model: ModelConfig) -> Iterator[Entry]:
    assert model.mla is not None
    if model.mla.q_lora_rank is None:
        yield Entry(f"{here}.linear_q_proj.weight", (f"{there}.q_proj.weight",), TURNED_QUERIES)
    else:
        yield Entry(f"{here}.linear_q_down_proj.weight", (f"{there}.q_a_proj.weight",), SAME)
        yield Entry(f"{here}.q_layernorm.weight", (f"{there}.q_a_layernorm.weight",), SAME)
        yield Entry(f"{here}.linear_q_up_proj.weight", (f"{there}.q_b_proj.weight",), TURNED_QUERIES)
    yield Entry(f"{here}.linear_kv_down_proj.weight", (f"{there}.kv_a_proj_with_mqa.weight",), TURNED_KEYS)
    yield Entry(f"{here}.kv_layernorm.weight", (f"{there}.kv_a_layernorm.weight",), SAME)
    yield Entry(f"{here}.linear_kv_up_proj.weight", (f"{there}.kv_b_proj.weight",), SAME)
    yield Entry(f"{here}.linear_proj.weight", (f"{there}.o_proj.weight",), SAME)
