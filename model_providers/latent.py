"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) of megatron-core's attention and linears.

Parameters have the names of megatron-core's own MLASelfAttention.  Two things differ: the down projections are whole on
every tensor rank, as in its Transformer Engine form (its other form loses a part of their gradient, since each rank
passes back its own heads' share of the rotated key alone), and positions come from our table.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    CheckpointWithoutOutput,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from torch import nn

from model_providers.portable import extend_cache, mask_type
from model_providers.rotary import rotate


@dataclass
class LatentSubmodules:
    """What the attention is built of; the first two are asked for by the parent."""

    core_attention: Any
    linear_proj: Any
    column_linear: Any
    down_linear: Any
    norm: Any


class LatentAttention(Attention):
    """Queries, keys and values through latents; the rotated part of the key is one for all heads."""

    def __init__(
        self,
        config: Any,
        submodules: LatentSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(
            config, submodules, layer_number, attn_mask_type, "self", cp_comm_type, pg_collection
        )
        heads = config.num_attention_heads
        query_width = heads * (config.qk_head_dim + config.qk_pos_emb_head_dim)
        if config.q_lora_rank is None:
            self.linear_q_proj = self._column(submodules, config.hidden_size, query_width)
        else:
            self.linear_q_down_proj = self._down_linear(submodules, config.q_lora_rank)
            self.q_layernorm = self._norm(submodules, config.q_lora_rank)
            self.linear_q_up_proj = self._column(submodules, config.q_lora_rank, query_width)
        latent = config.kv_lora_rank
        self.linear_kv_down_proj = self._down_linear(submodules, latent + config.qk_pos_emb_head_dim)
        self.kv_layernorm = self._norm(submodules, latent)
        self.linear_kv_up_proj = self._column(
            submodules, latent, heads * (config.qk_head_dim + config.v_head_dim)
        )
        forgets = config.recompute_granularity == "selective"
        self._forgets_heads = forgets and "mla_up_proj" in config.recompute_modules

    def _column(self, submodules: LatentSubmodules, size_in: int, size_out: int) -> nn.Module:
        return submodules.column_linear(
            size_in,
            size_out,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )

    def _down_linear(self, submodules: LatentSubmodules, size_out: int) -> nn.Module:
        return submodules.down_linear(
            self.config, self.config.hidden_size, size_out, tp_group=self.pg_collection.tp
        )

    def _norm(self, submodules: LatentSubmodules, width: int) -> nn.Module:
        return submodules.norm(config=self.config, hidden_size=width, eps=self.config.layernorm_epsilon)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,  # [s b h], under sequence parallelism [s/tp b h]
        attention_mask: torch.Tensor | None = None,
        *,
        inference_context: Any = None,
        rotary_pos_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert rotary_pos_emb is not None, "latent attention turns a part of its keys"
        latents = self._down(hidden_states)
        again = CheckpointWithoutOutput() if self._forgets_heads and self.training else None
        up = partial(self._up, rotary_pos_emb)  # a table of all layers', which nobody has to save
        query, key, value = up(*latents) if again is None else again.checkpoint(up, *latents)
        if inference_context is not None:
            key, value = extend_cache(inference_context, self.layer_number, key, value)
        core = self.core_attention
        if self.checkpoint_core_attention and self.training:
            core = self._checkpointed_attention_forward
        kind = mask_type(self.attn_mask_type, query.size(0), key.size(0))
        attended = core(query, key, value, attention_mask, attn_mask_type=kind)
        if again is not None:
            again.discard_output_and_register_recompute(attended)
        return self.linear_proj(attended)  # [s b h]

    def get_query_key_value_tensors(  # type: ignore[override]
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> query and key [s b n/tp (d + r)], value [s b n/tp v]; d does not turn, r does."""
        return self._up((cos, sin), *self._down(hidden_states))

    def _down(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> the queries' latent (or what stands for one), the keys' and values', and all tokens' part that turns."""
        config = self.config
        narrow = hidden_states if config.q_lora_rank is None else self.linear_q_down_proj(hidden_states)
        sizes = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
        latent, shared = self.linear_kv_down_proj(hidden_states).split(sizes, dim=-1)
        return narrow, latent.contiguous(), self._whole(shared.contiguous())

    def _up(
        self,
        angles: tuple[torch.Tensor, torch.Tensor],
        narrow: torch.Tensor,
        latent: torch.Tensor,
        shared: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.config
        plain, turned = config.qk_head_dim, config.qk_pos_emb_head_dim
        if config.q_lora_rank is None:
            query, _ = self.linear_q_proj(narrow)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(narrow))
        query = query.unflatten(-1, (-1, plain + turned))  # [s b n/tp (d + r)]
        joined, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        key, value = joined.unflatten(-1, (-1, plain + config.v_head_dim)).split(
            [plain, config.v_head_dim], dim=-1
        )
        shared = rotate(shared.unsqueeze(2), *angles)  # [s b 1 r]
        query_plain, query_turned = query.split([plain, turned], dim=-1)
        query = torch.cat((query_plain, rotate(query_turned, *angles)), dim=-1)
        key = torch.cat((key, shared.expand(-1, -1, key.size(2), -1)), dim=-1)
        return query, key, value

    def _whole(self, shared: torch.Tensor) -> torch.Tensor:
        """All tokens' rotated key, whose gradient is summed over the ranks, since each has other heads."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(shared, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(shared, group=self.tp_group)
