"""What a model is: sizes and options, nothing about where or how it runs.

Facts only, frozen.  What follows from them is a property (``head_width``, ``ffn_width``,
``padded_vocab_size``), so nothing writes into a config after loading.  A wrong fact is told with its limit
and the way out, all faults at once.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from model_providers import model_rules
from model_providers.errors import ModelError
from model_providers.moe_config import (
    BERTConfig,
    ELECTRAConfig,
    Facts,
    MLAConfig,
    MoEConfig,
    MTPConfig,
    T5Config,
)

GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh")
GATED_FFN_MULTIPLE = 256  # Llama's own code rounds up to this (github.com/meta-llama/llama, model.py)


class LinearScaling(Facts):
    """Positions divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1.0)


class Llama3Scaling(Facts):
    """Long wavelengths stretched by ``factor``, short ones kept, a ramp between (Grattafiori et al. 2024)."""

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(default=8.0, ge=1.0)
    low_freq_factor: float = Field(default=1.0, gt=0.0)
    high_freq_factor: float = Field(default=4.0, gt=0.0)
    original_max_positions: int = Field(default=8192, gt=0)


class YarnScaling(Facts):
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over dimensions, and scaled cosines and sines."""

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1.0)
    original_max_positions: int = Field(gt=0)
    beta_fast: float = Field(default=32.0, gt=0.0)
    beta_slow: float = Field(default=1.0, gt=0.0)
    attention_factor: float | None = None  # None: see cos_sin_scale
    mscale: float | None = None  # this and the next: DeepSeek-V2's variant
    mscale_all_dim: float | None = None
    truncate: bool = True  # the ramp's ends rounded outwards to whole dimensions

    @property
    def cos_sin_scale(self) -> float:
        """0.1 ln(factor) + 1 unless given; its square multiplies the attention scores (YaRN section 3.4)."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._concentration(self.mscale) / self._concentration(self.mscale_all_dim)
        return self._concentration(1.0)

    def _concentration(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0

    @property
    def score_scale(self) -> float:
        """What latent attention multiplies its scores by besides (DeepSeek-V2's modeling file, softmax_scale)."""
        return self._concentration(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]


class ModelConfig(Facts):
    """Sizes and options; every field can be overridden on top of a preset."""

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_kv_heads: int | None = Field(default=None, gt=0)  # None = as many as heads; 1 = multi-query
    head_dim: int | None = Field(default=None, gt=0)  # None = hidden_size / num_attention_heads
    ffn_hidden_size: int | None = Field(default=None, gt=0)  # None: see ffn_width
    vocab_size: int | None = Field(default=None, gt=0)  # None = the tokenizer's, filled in by the run
    max_sequence_length: int = Field(default=1024, gt=0)  # rows of the learned positions

    position_embedding: Literal["learned", "rotary", "relative", "none"] = "rotary"
    rotary_base: float = Field(default=10000.0, gt=1.0)
    rotary_fraction: float = Field(default=1.0, gt=0.0, le=1.0)  # share of head_width that turns
    rope_scaling: RopeScaling | None = None

    normalization: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = Field(default=1e-5, gt=0.0)
    activation: Literal["gelu", "gelu_tanh", "relu", "squared_relu", "swiglu", "geglu", "geglu_tanh"] = (
        "swiglu"
    )
    linear_bias: bool = False  # on all four linears of a block
    qkv_bias: bool = False  # on the query, key and value projection alone
    qk_norm: bool = False  # each head's query and key normalised before rotation
    # prefix: the beginning of a text is seen both ways, as objective prefix_lm wants it
    attention: Literal["causal", "prefix"] = "causal"
    sliding_window: int | None = Field(default=None, gt=0)  # a token sees itself and the window - 1 before it
    tie_embeddings: bool = True

    moe: MoEConfig | None = None  # None: every layer is dense
    mla: MLAConfig | None = None  # None: plain, grouped or multi-query attention
    mtp: MTPConfig | None = None  # None: the next token alone
    bert: BERTConfig | None = None  # None: causal, the next token
    electra: ELECTRAConfig | None = None  # beside bert; None: the encoder itself fills in
    t5: T5Config | None = None  # None: one stack

    hidden_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    init_std: float = Field(default=0.02, gt=0.0)
    scale_residual_init: bool = True  # std / sqrt(2 L) on both output projections (Radford et al. 2019, 2.3)
    pad_vocab_to_multiple_of: int = Field(default=128, gt=0)  # never depends on TP, so neither do the numbers

    @model_validator(mode="after")
    def _facts_agree(self) -> "ModelConfig":
        problems = [sentence for rule in model_rules.RULES if (sentence := rule(self)) is not None]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_attention_heads

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value head (Ainslie et al. 2023, arXiv:2305.13245)."""
        return self.num_attention_heads // self.kv_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """How many of a query head's numbers turn; the rest passes as it is."""
        if self.mla is not None:
            return self.mla.qk_rope_head_dim
        return int(self.head_width * self.rotary_fraction)

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * (self.head_width if self.mla is None else self.mla.qk_head_dim)

    @property
    def value_width(self) -> int:
        """Of all query heads together: what the output projection takes."""
        return self.num_attention_heads * (self.head_width if self.mla is None else self.mla.v_head_dim)

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def score_scale(self) -> float:
        """Scores are query times key times this."""
        if self.t5 is not None and not self.t5.scaled_scores:
            return 1.0
        if self.mla is None:
            return 1.0 / math.sqrt(self.head_width)
        stretched = self.rope_scaling.score_scale if isinstance(self.rope_scaling, YarnScaling) else 1.0
        return stretched / math.sqrt(self.mla.qk_head_dim)

    def has_experts(self, layer: int) -> bool:
        """Whether layer ``layer`` (0 is the first) has experts in place of its MLP."""
        if self.moe is None or layer < self.moe.first_dense:
            return False
        return (layer - self.moe.first_dense + 1) % self.moe.every == 0

    @property
    def draws_in_training(self) -> bool:
        """Whether layers need random numbers: dropout, or a router's jitter."""
        jitter = self.moe.jitter if self.moe is not None else 0.0
        return bool(self.hidden_dropout or self.attention_dropout or jitter)

    @property
    def num_expert_layers(self) -> int:
        """In the stack and, if it has experts at all, in multi-token prediction."""
        ahead = self.mtp.depth if self.mtp is not None and self.moe is not None else 0
        return ahead + sum(self.has_experts(layer) for layer in range(self.num_layers))

    @property
    def num_plan_layers(self) -> int:
        """What can be cut into pipeline stages: embedding, layers, final norm, layers that look ahead, head."""
        if self.t5 is not None:  # and the encoder's norm, and the decoder's embedding
            return self.t5.num_encoder_layers + self.num_layers + 5
        ends = 2 if self.norms_after else 3
        if self.electra is not None:  # the generator, and what puts its guesses into the text
            ends += self.electra.generator_layers + 1
        return self.num_layers + ends + (self.mtp.depth if self.mtp is not None else 0)

    @property
    def norms_after(self) -> bool:
        """Whether each sum is normalised, and no final norm is needed, instead of what goes into a layer."""
        return self.bert is not None and self.bert.norm == "post"

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only what is before it."""
        return self.bert is None and self.attention == "causal"

    @property
    def family(self) -> Literal["gpt", "bert", "t5"]:
        if self.t5 is not None:
            return "t5"
        return "gpt" if self.bert is None else "bert"

    @property
    def generator(self) -> "ModelConfig":
        """The small encoder's sizes, where there is one."""
        assert self.electra is not None
        width, small = self.hidden_size, self.electra.generator_hidden_size
        sizes = {
            "num_layers": self.electra.generator_layers,
            "hidden_size": small,
            "num_attention_heads": self.electra.generator_heads,
            "ffn_hidden_size": self.ffn_width * small // width,
        }
        return self.model_copy(update={**sizes, "num_kv_heads": None, "head_dim": None, "electra": None})

    @property
    def is_gated(self) -> bool:
        return self.activation in GATED_ACTIVATIONS

    @property
    def ffn_width(self) -> int:
        """``ffn_hidden_size``; by default 4h, and 8h/3 rounded up to a multiple of 256 for gated activations,
        which have three matrices instead of two (Shazeer 2020, arXiv:2002.05202).
        """
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if not self.is_gated:
            return 4 * self.hidden_size
        return math.ceil(8 * self.hidden_size / 3 / GATED_FFN_MULTIPLE) * GATED_FFN_MULTIPLE

    @property
    def has_qkv_bias(self) -> bool:
        return self.linear_bias or self.qkv_bias

    @property
    def known_vocab_size(self) -> int:
        if self.vocab_size is None:
            raise ModelError(
                "vocab_size=None: the model needs a number here; give vocab_size or a tokenizer that knows it"
            )
        return self.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: ``vocab_size`` rounded up; the loss never sees the added columns."""
        multiple = self.pad_vocab_to_multiple_of
        return math.ceil(self.known_vocab_size / multiple) * multiple
