"""ModelConfig, layout and number format as megatron-core's TransformerConfig, spelled nowhere else."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

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
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_width,
        ffn_hidden_size=model.ffn_width,
        normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=model.is_gated,
        activation_func=ACTIVATIONS[model.activation],
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
        recompute_modules=["core_attn"] if recompute.mode == "selective" else None,
        # Our gated activation is a module of the layer spec, and megatron-core takes one under this flag
        # only.
        use_te_activation_func=model.is_gated and not fuse,
        bias_activation_fusion=fuse and model.activation == "swiglu",
        bias_dropout_fusion=fuse,
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],
        transformer_impl="transformer_engine" if fuse else "local",
    )


def _leave(weight: torch.Tensor) -> None:
    """Draw nothing."""
