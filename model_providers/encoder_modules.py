"""The ends of a bidirectional encoder: its embedding, and its head of masked tokens and sentences."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from model_providers.chunked_loss import PendingLogits
from model_providers.config import ModelConfig
from model_providers.kernels import Kernels
from model_providers.layer_plan import BERTInputs, GPTValue, LossOfHead, PlanModule
from model_providers.linears import ReplicatedLinear
from model_providers.masks import positions
from model_providers.stage_modules import one_or_all, shard_stream, word_embeddings

NUM_SENTENCE_CLASSES = 2


class EncoderEmbedding(PlanModule):
    """Words, learned positions and token types, summed; normalised where norms come after sums."""

    takes = BERTInputs

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Any, kernels: Kernels):
        super().__init__()
        assert model.bert is not None
        self.config, self.tp_group = config, groups.tp
        self.word_embeddings = word_embeddings(model, config, groups, scatters=False)
        self.position_embeddings = self.type_embeddings = self.norm = None
        if model.position_embedding == "learned":
            self.position_embeddings = _table(model.max_sequence_length, config)
        if model.bert.token_types:
            self.type_embeddings = _table(model.bert.token_types, config)
        if model.norms_after:
            self.norm = kernels.norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

    def apply_to(self, value: BERTInputs) -> GPTValue:
        hidden = self.word_embeddings(value.tokens.t())  # [b s] -> [s b h]
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(positions(value.tokens, value.segments).t())
        if self.type_embeddings is not None:
            types = torch.zeros_like(value.tokens) if value.types is None else value.types
            hidden = hidden + self.type_embeddings(types.t())
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        if self.norm is not None:
            hidden = self.norm(hidden)
        with shard_stream(self):
            hidden = F.dropout(hidden, self.config.hidden_dropout, self.training)
        return GPTValue(hidden, value.segments)


class EncoderHead(PlanModule):
    """What was masked, as logits over this rank's share of the vocabulary, and with a pooler two classes of sentences;
    given targets too, the loss, without ever making all logits.

    The transform before the logits and the pooler are Devlin et al.'s, whose code has them (google-research/bert,
    run_pretraining.py and modeling.py).
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
        assert model.bert is not None
        self.loss = loss
        h = model.hidden_size
        self.config, self.tp_group = config, groups.tp
        self.transform = ReplicatedLinear(config, h, h, bias=True)
        self.norm = kernels.norm(config=config, hidden_size=h, eps=config.layernorm_epsilon)
        rows = model.padded_vocab_size // groups.tp.size()
        self.weight = nn.Parameter(torch.empty(rows, h, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(rows, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        self.projection = kernels.head_linear(
            h,
            model.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=groups.tp,
        )
        self.pooler = self.sentence = None
        if model.bert.sentence_head:
            self.pooler = ReplicatedLinear(config, h, h, bias=True, sees_all=True)
            self.sentence = ReplicatedLinear(config, h, NUM_SENTENCE_CLASSES, bias=True, sees_all=True)

    def apply_to(self, value: GPTValue) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        logits, _ = self.projection(self._transformed(value.hidden), weight=self.weight)
        return one_or_all([logits + self.bias, *self._sentences(value.hidden)])  # [s b v/tp]

    def loss_of(self, value: GPTValue, targets: Any) -> torch.Tensor:
        assert self.loss is not None, "nobody told this head how to make its loss"
        pending = PendingLogits(
            self._transformed(value.hidden), self.weight, self.loss.product, bias=self.bias
        )
        return self.loss.function(one_or_all([pending, *self._sentences(value.hidden)]), targets)

    def _transformed(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(self.config.activation_func(self.transform(hidden)))

    def _sentences(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Of a second task: [b 2]"""
        if self.pooler is None or self.sentence is None:
            return []
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        pooled = torch.tanh(self.pooler(hidden[:1]))  # [1 b h]
        return [self.sentence(pooled)[0]]


def _table(rows: int, config: TransformerConfig) -> nn.Embedding:
    empty = torch.empty(rows, config.hidden_size, dtype=config.params_dtype)
    return nn.Embedding.from_pretrained(empty, freeze=False)
