"""What a model's facts must agree on: one rule, one small function, one sentence with the way out.

`ModelConfig` runs them all when it is made, so that a user sees every fault at once.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the model runs the rules when it is made, so it imports this module
    from model_providers.config import ModelConfig

Rule = Callable[["ModelConfig"], str | None]


def heads_divide_hidden_size(model: "ModelConfig") -> str | None:
    if model.mla is None and model.head_dim is None and model.hidden_size % model.num_attention_heads:
        return (
            f"num_attention_heads={model.num_attention_heads}: does not divide "
            f"hidden_size={model.hidden_size}; choose a divisor, or set head_dim"
        )
    return None


def kv_heads_divide_heads(model: "ModelConfig") -> str | None:
    if model.num_attention_heads % model.kv_heads:
        legal = [n for n in range(1, model.num_attention_heads + 1) if model.num_attention_heads % n == 0]
        return (
            f"num_kv_heads={model.num_kv_heads}: must divide "
            f"num_attention_heads={model.num_attention_heads}; choose one of {legal}"
        )
    return None


def rotary_width_is_even(model: "ModelConfig") -> str | None:
    if model.mla is not None:
        if model.mla.qk_rope_head_dim % 2:
            return f"mla.qk_rope_head_dim={model.mla.qk_rope_head_dim}: rotation needs pairs; choose an even number"
        return None
    if model.position_embedding == "rotary" and (model.rotary_width % 2 or model.rotary_width == 0):
        return (
            f"rotary_fraction={model.rotary_fraction}: turns {model.rotary_width} of "
            f"head_dim={model.head_width}, and rotation needs pairs; choose a fraction that gives an even "
            f"number above 0"
        )
    return None


def rope_scaling_needs_rotary(model: "ModelConfig") -> str | None:
    if model.rope_scaling is not None and model.position_embedding != "rotary":
        return (
            f"rope_scaling={model.rope_scaling.kind}: has no effect with "
            f"position_embedding={model.position_embedding}; remove it, or set position_embedding=rotary"
        )
    return None


def llama3_bands_are_ordered(model: "ModelConfig") -> str | None:
    scaling = model.rope_scaling
    if (
        scaling is not None
        and scaling.kind == "llama3"
        and scaling.high_freq_factor <= scaling.low_freq_factor
    ):
        return (
            f"rope_scaling.high_freq_factor={scaling.high_freq_factor}: must be above "
            f"low_freq_factor={scaling.low_freq_factor}; Llama 3.1 uses 4 and 1"
        )
    return None


def yarn_betas_are_ordered(model: "ModelConfig") -> str | None:
    scaling = model.rope_scaling
    if scaling is not None and scaling.kind == "yarn" and scaling.beta_fast <= scaling.beta_slow:
        return (
            f"rope_scaling.beta_fast={scaling.beta_fast}: must be above beta_slow={scaling.beta_slow}; "
            f"the paper uses 32 and 1"
        )
    return None


def top_k_is_possible(model: "ModelConfig") -> str | None:
    moe = model.moe
    if moe is not None and moe.top_k > moe.num_experts:
        return f"moe.top_k={moe.top_k}: there are moe.num_experts={moe.num_experts}; choose at most that"
    return None


def some_layer_has_experts(model: "ModelConfig") -> str | None:
    moe = model.moe
    if moe is None or any(model.has_experts(layer) for layer in range(model.num_layers)):
        return None
    return (
        f"moe.first_dense={moe.first_dense}, moe.every={moe.every}: none of num_layers={model.num_layers} is left "
        "for experts; lower one of them, or remove moe"
    )


def groups_of_experts_are_whole(model: "ModelConfig") -> str | None:
    moe = model.moe
    if moe is None or (moe.num_groups is None and moe.group_top_k is None):
        return None
    if moe.num_groups is None or moe.group_top_k is None:
        return "moe.num_groups and moe.group_top_k: give both, or none"
    if moe.num_experts % moe.num_groups or moe.group_top_k > moe.num_groups or moe.top_k % moe.group_top_k:
        return (
            f"moe.num_groups={moe.num_groups}, moe.group_top_k={moe.group_top_k}: groups must divide "
            f"moe.num_experts={moe.num_experts}, and group_top_k must be at most that and divide moe.top_k={moe.top_k}"
        )
    if moe.top_k > moe.group_top_k * (moe.num_experts // moe.num_groups):
        return (
            f"moe.top_k={moe.top_k}: moe.group_top_k={moe.group_top_k} groups hold only "
            f"{moe.group_top_k * (moe.num_experts // moe.num_groups)} experts; lower it, or raise group_top_k"
        )
    return None


def sigmoid_scores_are_normalized(model: "ModelConfig") -> str | None:
    moe = model.moe
    if moe is not None and moe.score == "sigmoid" and not moe.normalize_top_k and moe.top_k > 1:
        return "moe.normalize_top_k=False with moe.score=sigmoid: megatron-core always makes them add up to 1; use True"
    return None


def one_expert_needs_a_weight(model: "ModelConfig") -> str | None:
    moe = model.moe
    if moe is not None and moe.top_k == 1 and moe.score == "softmax" and moe.normalize_top_k:
        return (
            "moe.top_k=1 with moe.normalize_top_k=True: the one expert's weight would always be 1, and the router "
            "would learn nothing; use normalize_top_k=False, or score=sigmoid"
        )
    return None


def bias_needs_sigmoid(model: "ModelConfig") -> str | None:
    moe = model.moe
    if moe is not None and moe.balances_by_bias and moe.score != "sigmoid":
        return (
            f"moe.bias_update_rate={moe.bias_update_rate} with moe.score={moe.score}: the bias is added to sigmoid "
            "scores; use score=sigmoid, or 0"
        )
    return None


def padding_needs_a_capacity(model: "ModelConfig") -> str | None:
    moe = model.moe
    if moe is not None and moe.pad_to_capacity and moe.capacity_factor is None:
        return "moe.pad_to_capacity=True: pad to what? give moe.capacity_factor, such as 1.25"
    return None


def experts_have_no_biases(model: "ModelConfig") -> str | None:
    if model.moe is not None and model.linear_bias:
        return (
            "linear_bias=True with moe: experts have no biases here; use linear_bias=False (qkv_bias is free)"
        )
    return None


def shared_gate_needs_shared_experts(model: "ModelConfig") -> str | None:
    moe = model.moe
    if moe is not None and moe.shared_gate and moe.shared_ffn_hidden_size is None:
        return "moe.shared_gate=True: there is nothing to gate; give moe.shared_ffn_hidden_size"
    return None


def latent_attention_stands_alone(model: "ModelConfig") -> str | None:
    if model.mla is None:
        return None
    foreign = {
        "num_kv_heads": model.num_kv_heads is not None and model.num_kv_heads != model.num_attention_heads,
        "head_dim": model.head_dim is not None,
        "qk_norm": model.qk_norm,
        "qkv_bias": model.has_qkv_bias,
        "sliding_window": model.sliding_window is not None,
        "rotary_fraction": model.rotary_fraction != 1.0,
        "position_embedding": model.position_embedding != "rotary",
    }
    found = [f"{key}={getattr(model, key)}" for key, is_set in foreign.items() if is_set]
    if found:
        stated = ", ".join(found)
        return (
            f"{stated} with mla: latent attention has widths, norms and positions of its own; leave them out"
        )
    return None


def looking_ahead_needs_no_learned_positions(model: "ModelConfig") -> str | None:
    if model.mtp is not None and model.position_embedding == "learned":
        return (
            "mtp with position_embedding=learned: the layers that look ahead embed tokens without positions; use "
            "position_embedding=rotary or none"
        )
    return None


def encoders_are_plain(model: "ModelConfig") -> str | None:
    if model.bert is None and model.t5 is None:
        return None
    if model.bert is not None and model.t5 is not None:
        return "bert and t5: a model is one of them; leave one out"
    kind = "bert" if model.bert is not None else "t5"
    foreign = {"mtp": model.mtp is not None, "mla": model.mla is not None, "moe": model.moe is not None}
    foreign["sliding_window"] = model.sliding_window is not None
    foreign["num_kv_heads"] = kind == "t5" and model.kv_heads != model.num_attention_heads
    found = [key for key, is_set in foreign.items() if is_set]
    if found:
        return f"{', '.join(found)} with {kind}: not for encoders here; leave out"
    return None


def generators_fit(model: "ModelConfig") -> str | None:
    electra = model.electra
    if electra is None:
        return None
    if model.bert is None or model.bert.sentence_head or model.bert.token_types:
        return "electra: needs bert.sentence_head=False and bert.token_types=0; its one task is to tell replaced tokens"
    if not model.tie_embeddings:
        return "tie_embeddings=False with electra: generator and encoder share the embeddings; use True"
    if electra.generator_hidden_size % electra.generator_heads:
        return (
            f"electra.generator_heads={electra.generator_heads}: must divide electra.generator_hidden_size="
            f"{electra.generator_hidden_size}"
        )
    return None


def relative_positions_are_t5s(model: "ModelConfig") -> str | None:
    if model.position_embedding == "relative" and model.t5 is None:
        return "position_embedding=relative without t5: distances in buckets are T5's; use rotary, learned or none"
    if model.position_embedding == "learned" and model.t5 is not None:
        return "position_embedding=learned with t5: not for two stacks here; use relative, rotary or none"
    return None


def prefixes_are_gpts(model: "ModelConfig") -> str | None:
    if model.attention == "causal":
        return None
    foreign = {
        "sliding_window": model.sliding_window is not None,
        "mla": model.mla is not None,
        "mtp": model.mtp is not None,
        "bert": model.bert is not None,
        "t5": model.t5 is not None,
    }
    found = [key for key, is_set in foreign.items() if is_set]
    return f"attention=prefix with {', '.join(found)}: not together here; leave out" if found else None


RULES: tuple[Rule, ...] = (
    heads_divide_hidden_size,
    kv_heads_divide_heads,
    rotary_width_is_even,
    rope_scaling_needs_rotary,
    llama3_bands_are_ordered,
    yarn_betas_are_ordered,
    top_k_is_possible,
    some_layer_has_experts,
    groups_of_experts_are_whole,
    sigmoid_scores_are_normalized,
    one_expert_needs_a_weight,
    bias_needs_sigmoid,
    padding_needs_a_capacity,
    experts_have_no_biases,
    shared_gate_needs_shared_experts,
    latent_attention_stands_alone,
    looking_ahead_needs_no_learned_positions,
    encoders_are_plain,
    generators_fit,
    relative_positions_are_t5s,
    prefixes_are_gpts,
)
