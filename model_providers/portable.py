"""Attention, norms and gated activations in torch, on CPU and CUDA alike, in megatron-core's seams.

Everything has the shape [s b n d], sequence outermost, as in megatron-core; SDPA takes permuted views of it.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import CrossAttention, SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model_providers.fused import GatedSiLU, RMSNorm, SplitHeads
from model_providers.masks import biased, visible
from model_providers.rotary import rotate

HOPPER = (9, 0)  # its compute capability, and those after it


class Norm(nn.Module):
    """LayerNorm or RMSNorm, as the config says; its parameters carry the sequence-parallel mark."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self.shape = eps, (hidden_size,)
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [... h] -> [... h]
        if self.bias is None:
            if x.is_cuda:  # where torch has a fused kernel
                return F.rms_norm(x, self.shape, self.weight, self.eps)
            return RMSNorm.apply(x, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class GatedActivation(nn.Module):
    """[s b 2f] -> [s b f]: the first half, activated, times the second."""

    def __init__(self, config: Any):
        super().__init__()
        self.activation = config.activation_func

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation is F.silu:
            return GatedSiLU.apply(x)
        gate, up = x.chunk(2, dim=-1)
        return self.activation(gate) * up


class CoreAttention(MegatronModule):
    """Scaled dot-product attention between the projections: [s b n d] x 3 -> [s b n*d]"""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **unused: Any
    ):
        super().__init__(config=config)
        self.is_causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self,
        query: torch.Tensor,  # [sq b n d]
        key: torch.Tensor,  # [sk b g d]
        value: torch.Tensor,  # [sk b g d]
        attention_mask: torch.Tensor | None = None,  # bool [b 1 sq sk], True = hidden
        attention_bias: torch.Tensor | None = None,  # [1 n sq sk], added to the scores
        **unused: Any,
    ) -> torch.Tensor:
        return attend(
            query,
            key,
            value,
            attention_mask,
            self.config,
            bias=attention_bias,
            is_causal=self.is_causal,
            training=self.training,
        )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor | None,
    config: Any,
    *,
    bias: torch.Tensor | None = None,
    is_causal: bool,
    training: bool,
) -> torch.Tensor:
    """Attention by torch's SDPA: [sq b n d], [sk b g d], [sk b g v] -> [sq b n*v]

    Narrower values are filled up with zeros: SDPA's fused kernels want one width, and the others keep the scores
    (measured on a CPU with latent attention's 192 and 128: 1.5 times slower).
    """
    (sq, b, n, d), sk, g = query.shape, key.size(0), key.size(2)
    width = value.size(-1)
    if width < d:
        value = F.pad(value, (0, d - width))
    window = config.window_size[0] + 1 if config.window_size else None
    seen = visible(sq, sk, window, hidden, query.device, is_causal=is_causal)
    if bias is not None:
        seen = biased(bias.to(query.dtype), seen, sq, sk, is_causal=is_causal)
    dropout = config.attention_dropout if training else 0.0
    grouped_kernel = query.is_cuda and seen is None  # flash attention on CUDA takes grouped heads as they are
    if n != g and seen is not None and seen.dim() == 4:
        # A mask for each sequence cannot be broadcast over folded groups.
        key, value = (x.repeat_interleave(n // g, dim=2) for x in (key, value))
        g = n
    fold = n != g and not grouped_kernel
    q, k, v = fold_groups(query, key, value) if fold else (x.permute(1, 2, 0, 3) for x in (query, key, value))
    if likes_cudnn(query, key, seen, dropout):
        kernels = fastest_first()
    else:
        kernels = own_stream(config) if dropout else nullcontext()
    with kernels:
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            dropout_p=dropout,
            is_causal=is_causal and seen is None and sq > 1,
            scale=config.softmax_scale or 1.0 / math.sqrt(d),
            enable_gqa=n != g and grouped_kernel,
        )
    # [b n sq v], or folded [b*g n/g sq v] -> [sq b n*v]
    out = out.view(b, -1, *out.shape[1:]).permute(3, 0, 1, 2, 4)[..., :width]
    return out.reshape(sq, b, n * width)


def fastest_first() -> AbstractContextManager[None]:
    """SDPA tries cuDNN's kernel first, which from Hopper on is the fastest, of those that are switched on.

    Measured on an H100 at sequence 4096 in bf16: forward and backward of a layer in 0.66 and 2.1 ms, where torch's own
    flash attention, its first choice, takes 1.1 and 3.6.
    """
    switches = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    }
    return sdpa_kernel([kind for kind, is_on in switches.items() if is_on()], set_priority=True)


def likes_cudnn(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor | None, dropout: float) -> bool:
    """A whole sequence's attention, without masks, which were not tried, or dropout, which its passes must agree on.

    Not a token's to a cache: for each length cuDNN would plan anew.
    """
    is_plain = seen is None and not dropout and query.size(0) == key.size(0)
    return is_plain and query.is_cuda and torch.cuda.get_device_capability(query.device) >= HOPPER


def fold_groups(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A group becomes a sequence of a larger batch: [s b n d], [s b g d] x 2 -> [b*g n/g s d] x 3, all views.

    SDPA's own ``enable_gqa`` leaves the fused kernel on the CPU: three times slower (measured).
    """
    s, b, g, d = key.shape
    q = query.unflatten(2, (g, -1)).permute(1, 2, 3, 0, 4).flatten(0, 1)
    shape = (b * g, q.size(1), s, d)
    k, v = (x.permute(1, 2, 0, 3).flatten(0, 1).unsqueeze(1).expand(shape) for x in (key, value))
    return q, k, v


def own_stream(config: Any) -> Any:
    """Tensor ranks hold different heads, so each drops from its own stream; under sequence parallelism the
    whole block is in it already.
    """
    return nullcontext() if config.sequence_parallel else tensor_parallel.get_cuda_rng_tracker().fork()


class RotatedSelfAttention(SelfAttention):
    """megatron-core's self-attention with rotation by a table made once, and keys cached after rotation.

    ``rotary_pos_emb`` is the table's cosines and sines for the positions at hand; megatron-core would compute
    both from angles twice in every layer.  Parameters and their names are the parent's.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,  # [s b h]
        attention_mask: torch.Tensor | None = None,
        *,
        inference_context: Any = None,
        rotary_pos_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_bias: torch.Tensor | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.heads(hidden_states, rotary_pos_emb)  # [s b n/tp d], [s b g/tp d] x 2
        if inference_context is not None:
            key, value = extend_cache(inference_context, self.layer_number, key, value)
        core = self.core_attention
        if self.checkpoint_core_attention and self.training:
            core = self._checkpointed_attention_forward
        kind = mask_type(self.attn_mask_type, query.size(0), key.size(0))
        biases = {} if attention_bias is None else {"attention_bias": attention_bias}
        return self.linear_proj(
            core(query, key, value, attention_mask, attn_mask_type=kind, **biases)
        )  # [s b h]

    def heads(
        self, hidden_states: torch.Tensor, angles: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        return query, key, value


def extend_cache(
    cache: Any, layer_number: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append to megatron-core's static context and return all keys and values so far: [sk b g d], [sk b g v]"""
    memory = cache.key_value_memory_dict
    if layer_number not in memory:
        memory[layer_number] = tuple(
            tensor.new_empty(cache.max_sequence_length, *tensor.shape[1:]) for tensor in (key, value)
        )
    keys, values = memory[layer_number]
    start = cache.sequence_len_offset
    end = start + key.size(0)
    keys[start:end], values[start:end] = key, value
    return keys[:end], values[:end]


def mask_type(ordinary: AttnMaskType, sq: int, sk: int) -> AttnMaskType:
    """Only Transformer Engine asks; ours looks at the two lengths itself."""
    if sq == sk or ordinary != AttnMaskType.causal:
        return ordinary
    return AttnMaskType.no_mask if sq == 1 else AttnMaskType.causal_bottom_right


class ReadingAttention(CrossAttention):
    """megatron-core's attention of a decoder to what the encoder made, without positions."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,  # [t b h]
        attention_mask: torch.Tensor | None = None,  # bool [b 1 1 s], True = hidden
        *,
        key_value_states: torch.Tensor,  # [s b h]
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.get_query_key_value_tensors(hidden_states, key_value_states)
        core = self.core_attention
        if self.checkpoint_core_attention and self.training:
            core = self._checkpointed_attention_forward
        return self.linear_proj(core(query, key, value, attention_mask, attn_mask_type=self.attn_mask_type))


class PortableSelfAttention(RotatedSelfAttention):
    """For SDPA: from the projection to rotated heads in one function (see SplitHeads)."""

    def heads(
        self, hidden_states: torch.Tensor, angles: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.config.num_query_groups < self.world_size:
            return super().heads(hidden_states, angles)  # gathers the key heads that tensor ranks share
        joined, _ = self.linear_qkv(hidden_states)  # [s b h] -> [s b g/tp*(n/g + 2)*d]
        grouped = (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head)
        joined = joined.unflatten(-1, grouped)
        if not self.config.qk_layernorm:
            return SplitHeads.apply(joined, *(angles or (None, None)))
        query, key, value = SplitHeads.apply(joined, None, None)
        query, key = self.q_layernorm(query), self.k_layernorm(key)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        return query, key, value
