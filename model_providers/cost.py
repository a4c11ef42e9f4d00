"""What a layer costs: parameters, arithmetic, and the memory of activations and states.

Conventions, because published figures differ by a factor of two:
- FLOPs count a multiply and an add as two; a training step is three forwards (backward is twice the forward;
  recompute is not counted, so these are model FLOPs, as in MFU: Chowdhery et al. 2022, arXiv:2204.02311,
  appendix B).
- Attention's score and value products: "full" counts all s keys for every query, 12 L q s a token (Narayanan
  et al. 2021); "causal" counts the half that a causal mask leaves, 6 L q s (Megatron-LM since 2025,
  Megatron-Bridge).
- The vocabulary counts unpadded: padding is not work that the model needs.
"""

from typing import Literal, NamedTuple

from model_providers.activation_memory import ActivationMemory, RecomputeMode
from model_providers.config import ModelConfig
from model_providers.errors import ModelError

AttentionCount = Literal["causal", "full"]


class LayerCost(NamedTuple):
    parameters: int  # of the whole layer, all tensor ranks together
    forward_flops_per_token: float
    activation_bytes_per_token: float  # kept for the backward pass on one rank of the tensor group

    @property
    def train_flops_per_token(self) -> float:
        return 3 * self.forward_flops_per_token


class StateBytes(NamedTuple):
    """Bytes a parameter needs in training; ZeRO shards them at stage 3, 2 and 1 (Rajbhandari et al. 2020)."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def layer_costs(
    model: ModelConfig,
    sequence_length: int,
    *,
    attention: AttentionCount = "causal",
    recompute: RecomputeMode = "none",
    tp: int = 1,
    sequence_parallel: bool = False,
    bytes_per_value: int = 2,
    fused: bool = True,
) -> list[LayerCost]:
    """Embedding, blocks, final norm, head, in the order of the plan; ``fused``: see activation_memory.py."""
    sharded = sequence_parallel and tp > 1
    memory = ActivationMemory(model, sequence_length, recompute, tp, sharded, bytes_per_value, fused)
    block = LayerCost(
        block_parameters(model), block_forward_flops(model, sequence_length, attention), memory.block()
    )
    embedding = LayerCost(embedding_parameters(model), 0.0, memory.embedding())
    final_norm = LayerCost(norm_parameters(model, model.hidden_size), 0.0, memory.final_norm())
    head_flops = 2.0 * model.hidden_size * model.known_vocab_size
    head = LayerCost(0 if model.tie_embeddings else word_parameters(model), head_flops, memory.head())
    return [embedding, *[block] * model.num_layers, final_norm, head]


def parameters(model: ModelConfig, *, padded: bool = True) -> int:
    """All parameters, a tied head once; ``padded=False`` leaves out the vocabulary's padding, as papers do."""
    words = 1 if model.tie_embeddings else 2
    unpadded = 0 if padded else words * (model.padded_vocab_size - model.known_vocab_size) * model.hidden_size
    head = (words - 1) * word_parameters(model)
    ends = embedding_parameters(model) + norm_parameters(model, model.hidden_size) + head
    return ends + model.num_layers * block_parameters(model) - unpadded


def train_flops_per_token(
    model: ModelConfig, sequence_length: int, attention: AttentionCount = "causal"
) -> float:
    """Model FLOPs of forward and backward for one token; see the conventions above."""
    costs = layer_costs(model, sequence_length, attention=attention)
    return sum(cost.train_flops_per_token for cost in costs)


def state_bytes_per_parameter(
    dtype: Literal["fp32", "bf16", "fp16"], *, gradient_dtype: Literal["fp32", "bf16", "fp16"] | None = None
) -> StateBytes:
    """Adam: two moments in fp32, and a master copy in fp32 where the weights are 16 bit: 16 bytes in all."""
    size = {"fp32": 4, "bf16": 2, "fp16": 2}
    for name in (dtype, gradient_dtype or dtype):
        if name not in size:
            raise ModelError(f"dtype={name}: unknown; choose one of {', '.join(size)}")
    return StateBytes(size[dtype], size[gradient_dtype or dtype], 8 if dtype == "fp32" else 12)


def word_parameters(model: ModelConfig) -> int:
    return model.padded_vocab_size * model.hidden_size


def embedding_parameters(model: ModelConfig) -> int:
    positions = model.max_sequence_length if model.position_embedding == "learned" else 0
    return word_parameters(model) + positions * model.hidden_size


def norm_parameters(model: ModelConfig, width: int) -> int:
    return width if model.normalization == "rmsnorm" else 2 * width


def block_parameters(model: ModelConfig) -> int:
    h, f, q, kv = model.hidden_size, model.ffn_width, model.query_width, model.kv_width
    fc1 = 2 * f if model.is_gated else f
    weights = h * (q + 2 * kv) + q * h + h * fc1 + f * h
    biases = (q + 2 * kv if model.has_qkv_bias else 0) + (h + fc1 + h if model.linear_bias else 0)
    head_norms = 2 * norm_parameters(model, model.head_width) if model.qk_norm else 0
    return weights + biases + 2 * norm_parameters(model, h) + head_norms


def block_forward_flops(
    model: ModelConfig, sequence_length: int, attention: AttentionCount = "causal"
) -> float:
    """For one token: 2 a weight, and 2 x 2 x keys x query width for scores and values."""
    if attention not in ("causal", "full"):
        raise ModelError(f"attention={attention}: unknown; choose causal or full")
    h, f, q, kv = model.hidden_size, model.ffn_width, model.query_width, model.kv_width
    linears = 2.0 * (h * (q + 2 * kv) + q * h + (3 if model.is_gated else 2) * h * f)
    return linears + 4.0 * q * _mean_keys(sequence_length, model.sliding_window, attention)


def _mean_keys(s: int, window: int | None, attention: AttentionCount) -> float:
    """Keys a query meets on average: s, or under the mask s/2 (the published rounding of (s+1)/2), fewer in a
    window.
    """
    if attention == "full":
        return float(s)
    w = min(window or s, s)
    return w - w * w / (2.0 * s)
