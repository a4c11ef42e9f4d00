"""ModelConfig, layout and number format as megatron-core's TransformerConfig, spelled nowhere else."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from model_providers.config import ModelConfig
from model_providers.layer_plan import Recompute
from model_providers.layout import Layout


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """So et al. 2021 (arXiv:2109.08668); megatron-core's own is wrapped in torch.compile."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": squared_relu,
    "swiglu": F.silu,  # the gate's half
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),  # T5 1.1's
}


def mcore_config(
    model: ModelConfig, layout: Layout, *, params_dtype: torch.dtype, recompute: Recompute, fuse: bool
) -> TransformerConfig:
    """``fuse``: megatron-core's fused activation and residual, torch.compile by another name, on CUDA only.

    The pipeline size stays 1: stages are the plan's affair, and megatron-core would offset layer numbers by
    it.
    """
    # (tokens before, tokens after)
    window = (model.sliding_window - 1, 0) if model.sliding_window else None
    kind = TransformerConfig if model.mla is None else MLATransformerConfig
    config = kind(
        **_latent_attention(model),
        **_experts(model, layout),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        # Of latent attention: what the output projection takes of each head.
        kv_channels=model.head_width if model.mla is None else model.mla.v_head_dim,
        softmax_scale=None if model.mla is None and model.t5 is None else model.score_scale,
        ffn_hidden_size=model.ffn_width,
        normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=model.is_gated,
        activation_func=F.gelu if model.activation == "geglu_tanh" else ACTIVATIONS[model.activation],
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        window_size=window,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        # Only allocated here: initial.py draws them, so that they depend on nothing but seed and name.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        init_method_std=model.init_std,
        use_cpu_initialization=True,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        fp16=params_dtype == torch.float16,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.shards_sequence,
        recompute_granularity="selective" if recompute.mode == "selective" else None,
        # Our gated activation is a module of the layer spec, and megatron-core takes one under this flag
        # only.
        use_te_activation_func=model.is_gated and not fuse,
        bias_activation_fusion=fuse and model.activation == "swiglu",
        bias_dropout_fusion=fuse,
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],
        transformer_impl="transformer_engine" if fuse else "local",
    )
    config.activation_func = ACTIVATIONS[model.activation]  # which the check of gated ones may not know
    # Set here because that check knows of experts and latent attention in Transformer Engine's form alone.
    config.recompute_modules = list(recompute.modules)
    return config


def _experts(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Routing, balance and capacity; which layers have experts is the plan's affair."""
    moe = model.moe
    if moe is None:
        return {}
    balance = {
        "aux_loss": moe.aux_loss,
        "seq_aux_loss": moe.sequence_aux_loss,
        "global_aux_loss": moe.global_aux_loss,
    }
    wanted = {name: coefficient for name, coefficient in balance.items() if coefficient > 0}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_router_score_function": moe.score,
        # Softmax over all experts and then the choice, or the choice and then softmax over the chosen.
        "moe_router_pre_softmax": moe.score == "softmax" and not moe.normalize_top_k,
        "moe_router_topk_scaling_factor": None if moe.scaling_factor == 1.0 else moe.scaling_factor,
        "moe_router_num_groups": moe.num_groups,
        "moe_router_group_topk": moe.group_top_k,
        "moe_router_dtype": None if moe.router_dtype == "model" else moe.router_dtype,
        "moe_input_jitter_eps": moe.jitter or None,
        "moe_router_load_balancing_type": list(wanted) or "none",
        "moe_aux_loss_coeff": list(wanted.values()) or 0.0,
        "moe_z_loss_coeff": moe.z_loss or None,
        "moe_router_enable_expert_bias": moe.balances_by_bias,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_expert_capacity_factor": moe.capacity_factor,
        "moe_token_drop_policy": moe.drop,
        "moe_pad_expert_input_to_capacity": moe.pad_to_capacity,
        "moe_token_dispatcher_type": "allgather" if layout.dispatcher == "allgather" else "alltoall",
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }


def _latent_attention(model: ModelConfig) -> dict[str, Any]:
    """Widths; positions are turned by our own table."""
    mla = model.mla
    if mla is None:
        return {}
    return {
        "multi_latent_attention": True,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_type": "rope",
    }


def _leave(weight: torch.Tensor) -> None:
    """Draw nothing."""
