"""The layers of a plan: embedding, block, final norm, layers that look ahead, head; each maps value to value."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from model_providers.chunked_loss import PendingLogits
from model_providers.config import ModelConfig
from model_providers.kernels import Kernels
from model_providers.layer_plan import GPTInputs, GPTValue, LossOfHead, PlanModule
from model_providers.masks import MaskMaker, positions
from model_providers.moe_layer import ExpertPlace
from model_providers.rotary import RotaryTable


class Embedding(PlanModule):
    """Tokens to vectors, plus learned positions that restart at each segment."""

    takes = GPTInputs

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Any):
        super().__init__()
        self.config, self.tp_group = config, groups.tp
        # Learned positions are added to whole sequences first, so that their gradient is whole too.
        has_positions = model.position_embedding == "learned"
        self.word_embeddings = word_embeddings(model, config, groups, scatters=not has_positions)
        self.looks_ahead = model.mtp is not None
        self.position_embeddings, self.restarts = None, model.attention != "prefix"
        if model.position_embedding == "learned":
            table = torch.empty(model.max_sequence_length, model.hidden_size, dtype=config.params_dtype)
            self.position_embeddings = nn.Embedding.from_pretrained(table, freeze=False)

    def apply_to(self, value: GPTInputs) -> GPTValue:
        hidden = self._scattered(value) if self.config.sequence_parallel else self._whole(value)
        with shard_stream(self):
            hidden = F.dropout(hidden, self.config.hidden_dropout, self.training)
        tokens = value.tokens if self.looks_ahead and self.training else None
        return GPTValue(hidden, value.segments, value.cache, tokens)

    def _whole(self, value: GPTInputs) -> torch.Tensor:
        hidden = self.word_embeddings(value.tokens.t())  # [b s] -> [s b h]
        if self.position_embeddings is None:
            return hidden
        start = value.cache.sequence_len_offset if value.cache is not None else 0
        where = positions(value.tokens, value.segments if self.restarts else None, start)  # [1 s] or [b s]
        return hidden + self.position_embeddings(where.t())

    def _scattered(self, value: GPTInputs) -> torch.Tensor:
        if self.position_embeddings is None:
            return embed(self.word_embeddings, value.tokens, self.config)
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
        experts: ExpertPlace | None = None,
        *,
        is_causal: bool = True,
    ):
        parts = self.parts_of(kernels, config, groups, experts, is_causal)
        super().__init__(config, parts, layer_number=layer_index + 1, pg_collection=groups)
        if self.recompute_mlp:
            self.mlp.register_forward_hook(_lend_bias)
        self.rotary, self.masks = rotary, masks

    config: TransformerConfig
    rotary: RotaryTable | None
    mlp: nn.Module
    attention_norm: nn.Module  # where norms come after sums
    mlp_norm: nn.Module

    @staticmethod
    def parts_of(
        kernels: Kernels,
        config: TransformerConfig,
        groups: Any,
        experts: ExpertPlace | None,
        is_causal: bool,
    ) -> TransformerLayerSubmodules:
        return kernels.block_submodules(config, experts, is_causal=is_causal)

    def apply_to(self, value: GPTValue) -> GPTValue:
        with shard_stream(self):
            hidden, _ = TransformerLayer.forward(
                self,
                value.hidden,
                attention_mask=self._hidden(value),
                rotary_pos_emb=self._cos_sin(value),
                inference_context=value.cache,
            )
        return value._replace(hidden=hidden)

    def _hidden(self, value: Any) -> torch.Tensor | None:
        return self.masks.hidden(getattr(value, "segments", None))

    def _cos_sin(self, value: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.rotary is None:
            return None
        cache = getattr(value, "cache", None)
        start = cache.sequence_len_offset if cache is not None else 0
        return self.rotary.cos_sin(
            start, start + value.hidden.size(0) * self._sequence_shards(), value.hidden
        )

    def _sequence_shards(self) -> int:
        return self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1


def _lend_bias(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A view of the bias that an MLP hands on, in place of the parameter.

    megatron-core's recompute returns it from an autograd function, which makes it that function's output and no leaf
    any more: the backward pass would then call itself for ever (seen with torch 2.13).
    """
    product, bias = output
    return product, None if bias is None else bias.view_as(bias)


class PostNormBlock(Block):
    """The layer as first published (Vaswani et al. 2017, section 3.1): each sum is normalised, and no input is."""

    def __init__(self, config: TransformerConfig, groups: Any, kernels: Kernels, *rest: Any, **named: Any):
        super().__init__(config, groups, kernels, *rest, **named)
        self.attention_norm, self.mlp_norm = (
            kernels.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            for _ in range(2)
        )

    @staticmethod
    def parts_of(
        kernels: Kernels,
        config: TransformerConfig,
        groups: Any,
        experts: ExpertPlace | None,
        is_causal: bool,
    ) -> TransformerLayerSubmodules:
        return kernels.block_submodules(config, experts, is_causal=is_causal, has_norms=False)

    def apply_to(self, value: GPTValue) -> GPTValue:
        with shard_stream(self):
            hidden, _ = TransformerLayer._forward_attention(
                self,
                value.hidden,
                attention_mask=self._hidden(value),
                rotary_pos_emb=self._cos_sin(value),
            )
            hidden = self.mlp_norm(TransformerLayer._forward_mlp(self, self.attention_norm(hidden)))
        return value._replace(hidden=hidden)


class FinalNorm(PlanModule):
    def __init__(self, config: TransformerConfig, kernels: Kernels):
        super().__init__()
        self.norm = kernels.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def apply_to(self, value: GPTValue) -> GPTValue:
        return value._replace(hidden=self.norm(value.hidden))


class LookAhead(PlanModule):
    """One depth of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2), in training only.

    Depth k joins the state of token i with the embedding of token i + k and predicts the token after that.  Parts and
    names are those of megatron-core's MultiTokenPredictionLayer; the embedding is tied to the model's.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: Any,
        kernels: Kernels,
        depth: int,
        block: Block,
    ):
        super().__init__()
        self.config, self.tp_group, self.depth = config, groups.tp, depth  # depth counts from 1
        self.word_embeddings = word_embeddings(model, config, groups, scatters=True)

        def norm() -> nn.Module:
            return kernels.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

        self.enorm, self.hnorm, self.final_layernorm = norm(), norm(), norm()
        self.eh_proj = kernels.column_linear(
            2 * config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=groups.tp,
        )
        self.transformer_layer = block

    def apply_to(self, value: GPTValue) -> GPTValue:
        if not self.training:
            return value
        assert value.tokens is not None, "the embedding hands the tokens on where layers look ahead"
        before = value.hidden if value.ahead is None else value.ahead.chunk(self.depth - 1)[-1]
        with shard_stream(self):
            embedded = F.dropout(self._embedded(value.tokens), self.config.hidden_dropout, True)
        joined = torch.cat((self.enorm(embedded), self.hnorm(before)), dim=-1)  # [s b 2h]
        hidden, _ = self.eh_proj(joined)  # [s b h/tp], of whole sequences
        if self.tp_group.size() > 1:
            hidden = tensor_parallel.gather_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        seen = self.transformer_layer.apply_to(GPTValue(hidden, value.segments))
        mine = self.final_layernorm(seen.hidden)
        return value._replace(ahead=mine if value.ahead is None else torch.cat((value.ahead, mine)))

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens ``depth`` further on; the last ones have none, and nothing asks what they predict."""
        ahead = F.pad(tokens[:, self.depth :], (0, self.depth))
        return embed(self.word_embeddings, ahead, self.config)


class Head(PlanModule):
    """Logits over this rank's share of the padded vocabulary; the weight is its own even when tied (see Tie).

    Where layers looked ahead, a tuple: the next token's logits, and those of each depth.  A head that is given targets
    too answers with the loss, and never makes all logits.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: Any,
        kernels: Kernels,
        loss: LossOfHead | None = None,
    ):
        super().__init__()
        self.loss = loss
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

    def apply_to(self, value: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return one_or_all([self._logits(hidden) for hidden in self._looked_at(value)])

    def loss_of(self, value: Any, targets: Any) -> torch.Tensor:
        assert self.loss is not None, "nobody told this head how to make its loss"
        product = self.loss.product
        pending = [PendingLogits(hidden, self.weight, product) for hidden in self._looked_at(value)]
        return self.loss.function(one_or_all(pending), targets)

    def _looked_at(self, value: GPTValue) -> list[torch.Tensor]:
        """Hidden states of the next token, and of each depth."""
        if value.ahead is None:
            return [value.hidden]
        return [value.hidden, *value.ahead.chunk(value.ahead.size(0) // value.hidden.size(0))]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits, _ = self.projection(hidden, weight=self.weight)  # [s b h] -> [s b v/tp]
        return logits


def one_or_all(outputs: list[Any]) -> Any:
    """What a loss takes: one head's output as it is, several as a tuple."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def word_embeddings(
    model: ModelConfig, config: TransformerConfig, groups: Any, *, scatters: bool
) -> tensor_parallel.VocabParallelEmbedding:
    """``scatters``: under sequence parallelism each rank gets its shard of the sequence at once."""
    words = tensor_parallel.VocabParallelEmbedding(
        model.padded_vocab_size,
        model.hidden_size,
        init_method=config.embedding_init_method,
        config=config,
        tp_group=groups.tp,
        reduce_scatter_embeddings=config.sequence_parallel and scatters,
    )
    words.tp_group = groups.tp  # megatron-core drops the group where torch.distributed is not initialised
    return words


def embed(words: nn.Module, tokens: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """[b s] -> [s b h], or under sequence parallelism [s/tp b h], which the module transposes on the way"""
    return words(tokens) if config.sequence_parallel else words(tokens.t())


def shard_stream(module: Any) -> contextlib.AbstractContextManager[None]:
    """Sequence shards differ between tensor ranks, so their dropout masks must too."""
    config = module.config
    draws = config.hidden_dropout or config.attention_dropout or config.moe_input_jitter_eps
    if config.sequence_parallel and module.training and draws:
        return tensor_parallel.get_cuda_rng_tracker().fork()
    return contextlib.nullcontext()
