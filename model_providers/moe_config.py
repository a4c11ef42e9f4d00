"""Facts of experts, latent attention and multi-token prediction: the parts of a model that are optional as a whole.

They stand beside `config.py`, whose `ModelConfig` has them as ``moe``, ``mla`` and ``mtp``.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Facts(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MoEConfig(Facts):
    """Experts in place of the MLP: who is chosen for a token, and how the choice is kept balanced."""

    num_experts: int = Field(ge=2)
    top_k: int = Field(ge=1)  # experts of a token
    ffn_hidden_size: int = Field(gt=0)  # of each expert
    shared_ffn_hidden_size: int | None = Field(default=None, gt=0)  # all shared experts together; None: none
    shared_gate: bool = False  # the shared experts' output times a sigmoid of the token (Qwen2-MoE)
    first_dense: int = Field(default=0, ge=0)  # layers at the bottom that stay dense (DeepSeekMoE)
    every: int = Field(default=1, ge=1)  # above those, the last of so many layers has experts

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize_top_k: bool = True  # the chosen experts' scores are made to add up to 1
    scaling_factor: float = Field(default=1.0, gt=0.0)  # of the routed experts' output (DeepSeek-V2, V3)
    num_groups: int | None = Field(
        default=None, ge=2
    )  # of experts, as they lie on nodes (DeepSeek-V3, 2.1.2)
    group_top_k: int | None = Field(default=None, ge=1)  # groups that a token may go to
    router_dtype: Literal["fp32", "fp64", "model"] = "fp32"
    jitter: float = Field(
        default=0.0, ge=0.0, lt=1.0
    )  # the router's input times 1 +- this (Fedus et al. 2021)

    aux_loss: float = Field(
        default=0.0, ge=0.0
    )  # balance within each micro-batch of a rank (Fedus et al. 2021)
    sequence_aux_loss: float = Field(default=0.0, ge=0.0)  # within each sequence (DeepSeek-V3, 2.1.2)
    global_aux_loss: float = Field(
        default=0.0, ge=0.0
    )  # over the global batch (Qiu et al. 2025, arXiv:2501.11873)
    z_loss: float = Field(default=0.0, ge=0.0)  # keeps the router's logits small (Zoph et al. 2022)
    bias_update_rate: float = Field(default=0.0, ge=0.0)  # above 0: loss-free balance (Wang et al. 2024)

    capacity_factor: float | None = Field(default=None, gt=0.0)  # None: dropless
    drop: Literal["probs", "position"] = "probs"  # who stays: the most probable tokens, or the first
    pad_to_capacity: bool = False  # every expert gets the same number of tokens

    @property
    def has_aux_loss(self) -> bool:
        return bool(self.aux_loss or self.sequence_aux_loss or self.global_aux_loss)

    @property
    def balances_by_bias(self) -> bool:
        return self.bias_update_rate > 0


class MLAConfig(Facts):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values from a small latent."""

    q_lora_rank: int | None = Field(default=None, gt=0)  # None: queries straight from the hidden state
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)  # of each head's query and key: the part that does not turn
    qk_rope_head_dim: int = Field(gt=0)  # the part that turns; its key is shared by all heads
    v_head_dim: int = Field(gt=0)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


class MTPConfig(Facts):
    """Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): layers that look further ahead."""

    depth: int = Field(default=1, ge=1)  # additional tokens predicted, one after the other
    loss_weight: float = Field(default=0.3, ge=0.0)  # of the mean of their losses


class BERTConfig(Facts):
    """A bidirectional encoder that fills in masked tokens (Devlin et al. 2019, arXiv:1810.04805)."""

    token_types: int = Field(default=2, ge=0)  # of first and second sentence; 0: none
    norm: Literal["post", "pre"] = (
        "post"  # after each sum, as published; pre: before, as Megatron's (2019, 5.3)
    )
    sentence_head: bool = True  # pooler and two classes, for a second task


class ELECTRAConfig(Facts):
    """A small generator fills in masked tokens, and the encoder tells which tokens were replaced (Clark et al. 2020,
    arXiv:2003.10555, section 2).  Both share the embeddings.
    """

    generator_layers: int = Field(gt=0)
    generator_hidden_size: int = Field(gt=0)  # a quarter to a half of the encoder's is best (section 3.2)
    generator_heads: int = Field(gt=0)
    discriminator_weight: float = Field(
        default=50.0, ge=0.0
    )  # of its loss beside the generator's (section 2)


class T5Config(Facts):
    """An encoder, and a decoder that reads what it made (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    ``num_layers`` are the decoder's.
    """

    num_encoder_layers: int = Field(gt=0)
    relative_buckets: int = Field(default=32, ge=4)  # of distances between query and key
    relative_max_distance: int = Field(default=128, gt=1)  # beyond it all fall into the last bucket
    scaled_scores: bool = False  # T5 leaves out attention's 1 / sqrt(d)
    scaled_output: bool = True  # with a tied head: its input times 1 / sqrt(h), as in T5 before 1.1
