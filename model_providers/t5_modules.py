"""The layers of two stacks: embeddings, blocks of encoder and decoder, the norm between them, head."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from model_providers.config import ModelConfig
from model_providers.kernels import Kernels
from model_providers.layer_plan import PlanModule, T5Inputs, T5Value
from model_providers.masks import MaskMaker, hidden_keys
from model_providers.moe_layer import ExpertPlace
from model_providers.relative import RelativeBias
from model_providers.rotary import RotaryTable
from model_providers.stage_modules import Block, Head, embed, shard_stream, word_embeddings


class SourceEmbedding(PlanModule):
    """The encoder's tokens to vectors; the decoder's travel on."""

    takes = T5Inputs

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Any):
        super().__init__()
        self.config = config
        self.word_embeddings = word_embeddings(model, config, groups, scatters=True)

    def apply_to(self, value: T5Inputs) -> T5Value:
        hidden = _embedded(self, value.tokens)
        return T5Value(hidden, targets=value.targets, segments=value.segments)


class TargetEmbedding(PlanModule):
    """What flowed becomes the memory, and the decoder's tokens flow; the embedding is tied to the encoder's."""

    takes = T5Value

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Any):
        super().__init__()
        self.config = config
        self.word_embeddings = word_embeddings(model, config, groups, scatters=True)

    def apply_to(self, value: T5Value) -> T5Value:
        assert value.targets is not None, "the decoder's tokens come with the encoder's"
        return T5Value(_embedded(self, value.targets), memory=value.hidden, segments=value.segments)


def _embedded(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
    hidden = embed(layer.word_embeddings, tokens, layer.config)
    with shard_stream(layer):
        return F.dropout(hidden, layer.config.hidden_dropout, layer.training)


class StackBlock(Block):
    """A layer of either stack; ``is_causal`` is the decoder's, which reads the memory too."""

    takes = T5Value

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: Any,
        kernels: Kernels,
        layer_index: int,
        rotary: RotaryTable | None,
        masks: MaskMaker,
        *,
        is_causal: bool,
    ):
        super().__init__(config, groups, kernels, layer_index, rotary, masks, is_causal=is_causal)
        self.reads, self.relative_bias = is_causal, None
        if model.position_embedding == "relative":
            assert model.t5 is not None
            self.relative_bias = RelativeBias(
                model.t5.relative_buckets,
                model.t5.relative_max_distance,
                model.num_attention_heads // groups.tp.size(),
                is_causal=is_causal,
                dtype=config.params_dtype,
            )

    @staticmethod
    def parts_of(
        kernels: Kernels,
        config: TransformerConfig,
        groups: Any,
        experts: ExpertPlace | None,
        is_causal: bool,
    ) -> TransformerLayerSubmodules:
        return kernels.block_submodules(
            config, experts, is_causal=is_causal, reads_over=groups.tp if is_causal else None
        )

    def apply_to(self, value: Any) -> Any:
        reading: dict[str, Any] = {}
        if self.reads:
            reading = {"context": value.memory, "context_mask": hidden_keys(value.segments)}
        with shard_stream(self), self.precision():
            hidden, _ = TransformerLayer.forward(
                self,
                value.hidden,
                attention_mask=None if self.reads else self.masks.hidden(value.segments),
                rotary_pos_emb=self._cos_sin(value),
                attention_bias=self._bias(value.hidden),
                **reading,
            )
        return value._replace(hidden=hidden)

    def _bias(self, hidden: torch.Tensor) -> torch.Tensor | None:
        if self.relative_bias is None:
            return None
        length = hidden.size(0) * self._sequence_shards()
        return self.relative_bias(length, length)


class StackNorm(PlanModule):
    """The norm at the end of a stack, and its dropout (Raffel et al. 2020, section 2.1)."""

    takes = T5Value

    def __init__(self, config: TransformerConfig, kernels: Kernels):
        super().__init__()
        self.config = config
        self.norm = kernels.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def apply_to(self, value: T5Value) -> T5Value:
        hidden = self.norm(value.hidden)
        with shard_stream(self):
            hidden = F.dropout(hidden, self.config.hidden_dropout, self.training)
        return value._replace(hidden=hidden)


class TargetHead(Head):
    """Logits of the decoder's tokens."""

    takes = T5Value

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Any, kernels: Kernels):
        super().__init__(model, config, groups, kernels)
        assert model.t5 is not None
        self.scale = model.hidden_size**-0.5 if model.t5.scaled_output and model.tie_embeddings else 1.0

    def apply_to(self, value: Any) -> torch.Tensor:
        return self._logits(value.hidden * self.scale if self.scale != 1.0 else value.hidden)
