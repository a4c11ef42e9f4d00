"""The layers of a plan: embedding, block, final norm, head; each maps value to value."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from model_providers.config import ModelConfig
from model_providers.kernels import Kernels
from model_providers.layer_plan import GPTInputs, GPTValue, PlanModule
from model_providers.masks import MaskMaker, positions
from model_providers.rotary import RotaryTable


class Embedding(PlanModule):
    """Tokens to vectors, plus learned positions that restart at each segment."""

    takes = GPTInputs

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Any):
        super().__init__()
        self.config, self.tp_group = config, groups.tp
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            model.padded_vocab_size,
            model.hidden_size,
            init_method=config.embedding_init_method,
            config=config,
            tp_group=groups.tp,
            # Learned positions are added to whole sequences first, so that their gradient is whole too.
            reduce_scatter_embeddings=config.sequence_parallel and model.position_embedding != "learned",
        )
        # megatron-core drops the group where torch.distributed is not initialised.
        self.word_embeddings.tp_group = groups.tp
        self.position_embeddings = None
        if model.position_embedding == "learned":
            table = torch.empty(model.max_sequence_length, model.hidden_size, dtype=config.params_dtype)
            self.position_embeddings = nn.Embedding.from_pretrained(table, freeze=False)

    def apply_to(self, value: GPTInputs) -> GPTValue:
        hidden = self._scattered(value) if self.config.sequence_parallel else self._whole(value)
        with shard_stream(self):
            hidden = F.dropout(hidden, self.config.hidden_dropout, self.training)
        return GPTValue(hidden, value.segments, value.cache)

    def _whole(self, value: GPTInputs) -> torch.Tensor:
        hidden = self.word_embeddings(value.tokens.t())  # [b s] -> [s b h]
        if self.position_embeddings is None:
            return hidden
        start = value.cache.sequence_len_offset if value.cache is not None else 0
        where = positions(value.tokens, value.segments, start)  # [1 s] or [b s]
        return hidden + self.position_embeddings(where.t())

    def _scattered(self, value: GPTInputs) -> torch.Tensor:
        if self.position_embeddings is None:
            return self.word_embeddings(value.tokens)  # [b s] -> [s/tp b h], transposed on the way
        return tensor_parallel.scatter_to_sequence_parallel_region(self._whole(value), group=self.tp_group)


class Block(PlanModule, TransformerLayer):
    """megatron-core's transformer layer, called with a value."""

    def __init__(
        self,
        config: TransformerConfig,
        groups: Any,
        kernels: Kernels,
        layer_index: int,
        rotary: RotaryTable | None,
        masks: MaskMaker,
    ):
        super().__init__(
            config, kernels.block_submodules(config), layer_number=layer_index + 1, pg_collection=groups
        )
        self.rotary, self.masks = rotary, masks

    config: TransformerConfig
    rotary: RotaryTable | None

    def apply_to(self, value: GPTValue) -> GPTValue:
        with shard_stream(self):
            hidden, _ = TransformerLayer.forward(
                self,
                value.hidden,
                attention_mask=self.masks.hidden(value.segments),
                rotary_pos_emb=self._cos_sin(value),
                inference_context=value.cache,
            )
        return GPTValue(hidden, value.segments, value.cache)

    def _cos_sin(self, value: GPTValue) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.rotary is None:
            return None
        shards = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        start = value.cache.sequence_len_offset if value.cache is not None else 0
        return self.rotary.cos_sin(start, start + value.hidden.size(0) * shards, value.hidden)


class FinalNorm(PlanModule):
    def __init__(self, config: TransformerConfig, kernels: Kernels):
        super().__init__()
        self.norm = kernels.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def apply_to(self, value: GPTValue) -> GPTValue:
        return value._replace(hidden=self.norm(value.hidden))


class Head(PlanModule):
    """Logits over this rank's share of the padded vocabulary; the weight is its own even when tied (see Tie)."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Any, kernels: Kernels):
        super().__init__()
        rows = model.padded_vocab_size // groups.tp.size()
        self.weight = nn.Parameter(torch.empty(rows, model.hidden_size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self.projection = kernels.head_linear(
            model.hidden_size,
            model.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=groups.tp,
        )

    def apply_to(self, value: GPTValue) -> torch.Tensor:
        logits, _ = self.projection(value.hidden, weight=self.weight)  # [s b h] -> [s b v/tp]
        return logits


def shard_stream(module: Any) -> contextlib.AbstractContextManager[None]:
    """Sequence shards differ between tensor ranks, so their dropout masks must too."""
    config = module.config
    if config.sequence_parallel and module.training and (config.hidden_dropout or config.attention_dropout):
        return tensor_parallel.get_cuda_rng_tracker().fork()
    return contextlib.nullcontext()
