"""Which implementation of each layer: Transformer Engine on CUDA where it is installed, else torch.

The only file that looks for Transformer Engine and for NVIDIA's apex.  Norms and linears stay separate
modules in both sets, which Transformer Engine could fuse, so that the names of parameters do not depend on
the kernels.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.extensions import transformer_engine as mcore_te
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from model_providers.errors import ModelError
from model_providers.experts import GroupedExperts
from model_providers.fp8.config import Fp8Config
from model_providers.fp8.experts import fp8_experts
from model_providers.fp8.linears import fp8_linears, fp8_replicated
from model_providers.latent import LatentAttention, LatentSubmodules
from model_providers.linears import (
    ColumnLinear,
    ReplicatedLinear,
    RowLinear,
    WideColumnLinear,
    WideRowLinear,
    cpu_multiplies_bf16,
)
from model_providers.moe_layer import ExpertPlace, expert_layer
from model_providers.portable import (
    CoreAttention,
    GatedActivation,
    Norm,
    PortableSelfAttention,
    ReadingAttention,
    RotatedSelfAttention,
    attend,
)

logger = logging.getLogger(__name__)

KernelChoice = Literal["auto", "te", "torch"]


class Kernels(NamedTuple):
    """One set of implementations, in megatron-core's signatures."""

    name: str
    norm: Any
    column_linear: Any
    row_linear: Any
    head_linear: Any
    self_attention: Any
    core_attention: Any
    fuse: bool  # let megatron-core use its fused activation and bias-dropout-add
    precision: Callable[[], AbstractContextManager[None]] = nullcontext  # entered around each block's work
    is_transformer_engine: bool = False
    down_linear: Any = ReplicatedLinear  # to the latents of attention
    experts: type[GroupedExperts] = GroupedExperts

    def block_submodules(
        self,
        config: TransformerConfig,
        experts: ExpertPlace | None = None,
        *,
        is_causal: bool = True,
        has_norms: bool = True,
        reads_over: Any = None,
    ) -> TransformerLayerSubmodules:
        """The layer spec of a block, dense unless ``experts`` are placed somewhere.

        ``has_norms``: whether a norm stands before attention and MLP; ``reads_over``: the tensor group, if it attends
        to an encoder too.
        """
        reading: dict[str, Any] = {}
        if reads_over is not None:
            reading = {
                "pre_cross_attn_layernorm": self.norm,
                "cross_attention": self._reading_attention(reads_over),
                "cross_attn_bda": get_bias_dropout_add,
            }
        norm = self.norm if has_norms else IdentityOp
        mlp = MLPSubmodules(
            linear_fc1=self.column_linear, activation_func=GatedActivation, linear_fc2=self.row_linear
        )
        dense = ModuleSpec(module=MLP, params={"ffn_hidden_size": config.ffn_hidden_size}, submodules=mlp)
        return TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=self._attention(config, is_causal=is_causal),
            self_attn_bda=get_bias_dropout_add,
            **reading,
            pre_mlp_layernorm=norm,
            mlp=dense if experts is None else expert_layer(experts, mlp, self.experts),
            mlp_bda=get_bias_dropout_add,
        )

    def _reading_attention(self, tp_group: Any) -> ModuleSpec:
        column = partial(self.column_linear, tp_group=tp_group)
        parts = CrossAttentionSubmodules(
            linear_q=column,
            linear_kv=column,
            core_attention=self.core_attention,
            linear_proj=self.row_linear,
        )
        return ModuleSpec(
            module=ReadingAttention, params={"attn_mask_type": AttnMaskType.no_mask}, submodules=parts
        )

    def _attention(self, config: TransformerConfig, *, is_causal: bool) -> ModuleSpec:
        if config.multi_latent_attention:
            widths = {
                "k_channels": config.qk_head_dim + config.qk_pos_emb_head_dim,
                "v_channels": config.v_head_dim,
            }
            parts: Any = LatentSubmodules(
                core_attention=partial(self.core_attention, **widths),
                linear_proj=self.row_linear,
                column_linear=self.column_linear,
                down_linear=self.down_linear,
                norm=self.norm,
            )
            return ModuleSpec(module=LatentAttention, submodules=parts)
        qk_norm = self.norm if config.qk_layernorm else IdentityOp
        parts = SelfAttentionSubmodules(
            linear_qkv=self.column_linear,
            core_attention=self.core_attention,
            linear_proj=self.row_linear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        )
        kind = AttnMaskType.causal if is_causal else AttnMaskType.no_mask
        return ModuleSpec(module=self.self_attention, params={"attn_mask_type": kind}, submodules=parts)


def choose_kernels(choice: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Kernels:
    """For a device type, "cpu" or "cuda", and the weights' number format.

    "auto" takes Transformer Engine where it can, and logs one line; not for fp32, of whose products Transformer Engine
    keeps the first 10 bits of each factor (TF32), unless cuBLAS is told not to (NVIDIA_TF32_OVERRIDE=0).
    """
    if choice not in ("auto", "te", "torch"):
        raise ModelError(f"kernels={choice}: unknown; choose auto, te or torch")
    if choice == "torch":
        return torch_kernels(device)
    obstacle = transformer_engine_obstacle(device)
    if obstacle is None and choice == "auto" and dtype == torch.float32:
        obstacle = "Transformer Engine multiplies fp32 in TF32 (kernels=te takes it nevertheless)"
    if obstacle is None:
        logger.info("kernels=%s: Transformer Engine", choice)
        return transformer_engine_kernels()
    if choice == "te":
        raise ModelError(f"kernels=te: {obstacle}; use kernels=torch, or auto, which falls back by itself")
    kernels = torch_kernels(device)
    logger.info("kernels=auto: %s, because %s", kernels.name, obstacle)
    return kernels


def fp8_kernels(kernels: Kernels, facts: Fp8Config) -> Kernels:
    """The same, but that linear layers of blocks follow a recipe, by our own products."""
    is_ours = issubclass(kernels.column_linear, ColumnLinear)
    column, row = (kernels.column_linear, kernels.row_linear) if is_ours else (ColumnLinear, RowLinear)
    column, row = fp8_linears(facts, column, row)
    return kernels._replace(
        name=f"{kernels.name}, {facts.recipe} fp8",
        column_linear=column,
        row_linear=row,
        down_linear=fp8_replicated(facts),
        experts=fp8_experts(facts) if facts.may_take_experts else GroupedExperts,
    )


def transformer_engine_obstacle(device: str) -> str | None:
    """Why Transformer Engine cannot be used, or None."""
    if device != "cuda":
        return f"Transformer Engine runs on CUDA and the device is {device}"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed (pip install --no-build-isolation 'megaloom[te]')"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a build against another CUDA or torch fails in any way it likes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"Transformer Engine is installed but does not load ({reason})"
    if not mcore_te.HAVE_TE:
        return "megatron-core did not find Transformer Engine when it was imported"
    return None


def apex_obstacle() -> str | None:
    """Why NVIDIA's apex cannot be used, or None; PyPI's apex is a toolkit for the Pyramid web framework."""
    if importlib.util.find_spec("apex") is None:
        return "apex is not installed"
    try:
        importlib.import_module("apex.normalization.fused_layer_norm")
    except Exception as error:
        if importlib.util.find_spec("pyramid") is not None or "pyramid" in str(error):
            return "the installed apex is PyPI's package for the Pyramid web framework, not NVIDIA's"
        return f"the installed apex has no fused norms ({type(error).__name__}); build NVIDIA's from source"
    return None


def torch_kernels(device: str = "cpu") -> Kernels:
    norm: Any = Norm
    column: Any
    row: Any
    name, column, row = "torch", ColumnLinear, RowLinear
    if device == "cuda" and apex_obstacle() is None:
        norm, name = _apex_or_torch_norm, "torch with apex norms"
    if device == "cpu" and not cpu_multiplies_bf16():
        column, row = WideColumnLinear, WideRowLinear
    return Kernels(
        name=name,
        norm=norm,
        column_linear=column,
        row_linear=row,
        head_linear=column,
        self_attention=PortableSelfAttention,
        core_attention=CoreAttention,
        fuse=False,
    )


def transformer_engine_kernels() -> Kernels:
    return Kernels(
        name="transformer engine",
        norm=mcore_te.TENorm,
        column_linear=mcore_te.TEColumnParallelLinear,
        row_linear=mcore_te.TERowParallelLinear,
        head_linear=ColumnParallelLinear,  # as in GPTModel: Transformer Engine's takes no weight from outside
        self_attention=RotatedSelfAttention,
        core_attention=_te_core_attention(),
        fuse=True,
        is_transformer_engine=True,
    )


def _apex_or_torch_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
    """apex has a fused LayerNorm behind megatron-core's wrapper; RMSNorm it has not there."""
    wanted = FusedLayerNorm if config.normalization == "LayerNorm" else Norm
    return wanted(config=config, hidden_size=hidden_size, eps=eps)


def _te_core_attention() -> type:
    """A class made on demand: its base is a real class only where Transformer Engine is installed."""

    class SegmentedAttention(mcore_te.TEDotProductAttention):  # type: ignore[misc]
        """Packed documents, whose mask Transformer Engine takes only unfused, and biases go through torch's SDPA."""

        def forward(
            self,
            query: Any,
            key: Any,
            value: Any,
            attention_mask: Any,
            attn_mask_type: Any,
            attention_bias: Any = None,
            **rest: Any,
        ) -> Any:
            if attention_mask is None and attention_bias is None:
                return super().forward(query, key, value, None, attn_mask_type, **rest)
            return attend(
                query,
                key,
                value,
                attention_mask,
                self.config,
                bias=attention_bias,
                is_causal=attn_mask_type != AttnMaskType.no_mask,
                training=self.training,
            )

    return SegmentedAttention
