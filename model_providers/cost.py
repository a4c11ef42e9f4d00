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
from model_providers.fp8.config import Fp8Config

AttentionCount = Literal["causal", "full"]


class LayerCost(NamedTuple):
    parameters: int  # of the whole layer, all ranks together
    forward_flops_per_token: float  # of a token's own experts only
    activation_bytes_per_token: float  # kept for the backward pass on one rank of the tensor group
    expert_parameters: int = 0  # of ``parameters``: routed experts, which ep shares out
    again_bytes_per_token: float = (
        0.0  # more activations, while selective recompute brings some of the layer's back
    )

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
    target_length: int | None = None,
    attention: AttentionCount = "causal",
    recompute: RecomputeMode = "none",
    recompute_modules: tuple[str, ...] = ("core_attn",),
    tp: int = 1,
    etp: int | None = None,
    sequence_parallel: bool = False,
    bytes_per_value: int = 2,
    fused: bool = True,
    chunked_loss: bool = False,
    fp8: Fp8Config | None = None,
) -> list[LayerCost]:
    """Embedding, blocks, final norm, head, in the order of the plan.

    Of two stacks a token is one of the encoder's: the decoder has ``target_length`` for each ``sequence_length`` of
    them, a quarter if it is not known.  ``etp``: of the experts, None: as ``tp``; ``fused``: see activation_memory.py.
    """
    sharded = sequence_parallel and tp > 1
    memory = ActivationMemory(
        model,
        sequence_length,
        recompute,
        tp,
        sharded,
        bytes_per_value,
        fused,
        etp=tp if etp is None else etp,
        modules=recompute_modules,
        chunked_loss=chunked_loss,
    )

    if model.electra is not None:
        return _electra_costs(model, memory, fp8)
    if model.t5 is not None:
        return _stack_costs(model, memory, target_length or max(1, sequence_length // 4), fp8)

    def block(has_experts: bool, memory: ActivationMemory) -> LayerCost:
        return LayerCost(
            block_parameters(model, has_experts=has_experts),
            block_forward_flops(model, sequence_length, attention, has_experts=has_experts),
            memory.block(has_experts=has_experts),
            routed_parameters(model) if has_experts else 0,
            memory.again(has_experts=has_experts),
        )

    embedding = LayerCost(embedding_parameters(model), 0.0, memory.embedding())
    blocks = [
        block(model.has_experts(layer), _of_block(memory, fp8, layer, model.num_layers))
        for layer in range(model.num_layers)
    ]
    final_norm = LayerCost(norm_parameters(model, model.hidden_size), 0.0, memory.final_norm())
    final_norms = [] if model.norms_after else [final_norm]
    head_flops = 2.0 * model.hidden_size * (model.known_vocab_size + (model.hidden_size if model.bert else 0))
    ahead = model.mtp.depth if model.mtp is not None else 0
    head = LayerCost(
        (0 if model.tie_embeddings else word_parameters(model)) + encoder_head_parameters(model),
        head_flops * (1 + ahead),
        memory.head() * (1 + ahead),
    )
    looking_ahead = [_looking_ahead(model, block(model.moe is not None, memory), memory)] * ahead
    return [embedding, *blocks, *final_norms, *looking_ahead, head]


def _of_block(memory: ActivationMemory, fp8: Fp8Config | None, index: int, depth: int) -> ActivationMemory:
    """What block ``index`` of a stack of ``depth`` keeps."""
    if fp8 is None or not fp8.is_fp8_block(index, depth):
        return memory
    return memory._replace(eight_bits=fp8.bytes_per_number, has_fp8_experts=fp8.takes_experts)


def _electra_costs(model: ModelConfig, memory: ActivationMemory, fp8: Fp8Config | None) -> list[LayerCost]:
    """A generator, its guesses, an encoder; the embeddings are in the first layer."""
    h, small = model.hidden_size, model.generator
    g, s = small.hidden_size, memory.sequence_length
    norm, positions = norm_parameters(model, h), 0
    if model.position_embedding == "learned":
        positions = model.max_sequence_length * h
    wide = memory.bytes_per_value * h

    def block(of: ModelConfig, index: int) -> LayerCost:
        its = _of_block(memory._replace(model=of), fp8, index, of.num_layers)
        return LayerCost(
            block_parameters(of), block_forward_flops(of, s), its.block(), again_bytes_per_token=its.again()
        )

    embedding = LayerCost(
        word_parameters(model) + positions + norm + h * g + g, 2.0 * h * g, memory.embedding() + 2 * wide
    )
    replacement = LayerCost(
        g * h + h + 2 * norm + model.padded_vocab_size,
        2.0 * g * h + 2.0 * h * model.known_vocab_size,
        memory.head() + memory.embedding() + wide,
    )
    final_norm = [] if model.norms_after else [LayerCost(norm, 0.0, memory.final_norm())]
    head = LayerCost(h * h + h + h + 1, 2.0 * h * h + 2.0 * h, 3 * wide)
    generator = [block(small, index) for index in range(small.num_layers)]
    encoder = [block(model, index) for index in range(model.num_layers)]
    return [embedding, *generator, replacement, *encoder, *final_norm, head]


def _stack_costs(
    model: ModelConfig, memory: ActivationMemory, target_length: int, fp8: Fp8Config | None
) -> list[LayerCost]:
    """Encoder and decoder; the tables of distances are in each stack's first layer."""
    t5, h, s = model.t5, model.hidden_size, memory.sequence_length
    assert t5 is not None
    share, depth = target_length / s, t5.num_encoder_layers
    norm = norm_parameters(model, h)
    biases = t5.relative_buckets * model.num_attention_heads if model.position_embedding == "relative" else 0
    linears = _attention_linears(model)
    mlp = 2.0 * (3 if model.is_gated else 2) * h * model.ffn_width
    wide = 2.0 * (model.query_width + model.value_width)
    reading = attention_parameters(model)
    target = memory._replace(sequence_length=target_length)

    def encoder(index: int) -> LayerCost:
        table = biases if index == 0 else 0
        its = _of_block(memory, fp8, index, depth)
        return LayerCost(
            block_parameters(model) + table,
            linears + mlp + wide * s,
            its.block(),
            again_bytes_per_token=its.again(),
        )

    def decoder(index: int) -> LayerCost:
        table = biases if index == 0 else 0
        queries = 2.0 * 2 * h * model.query_width  # of the decoder's tokens; keys and values of the encoder's
        flops = (
            share * (linears + mlp + queries + wide * (target_length / 2 + s)) + 2.0 * h * 2 * model.kv_width
        )
        its, keys = (_of_block(one, fp8, index, model.num_layers) for one in (target, memory))
        kept = share * (its.block() + its.reading_queries()) + keys.reading_keys()
        return LayerCost(
            block_parameters(model) + reading + norm + table,
            flops,
            kept,
            again_bytes_per_token=share * its.again(),
        )

    head = LayerCost(
        0 if model.tie_embeddings else word_parameters(model),
        share * 2.0 * h * model.known_vocab_size,
        share * target.head(),
    )
    return [
        LayerCost(word_parameters(model), 0.0, memory.embedding()),
        *(encoder(index) for index in range(t5.num_encoder_layers)),
        LayerCost(norm, 0.0, memory.final_norm()),
        LayerCost(0, 0.0, share * target.embedding()),
        *(decoder(index) for index in range(model.num_layers)),
        LayerCost(norm, 0.0, share * target.final_norm()),
        head,
    ]


def parameters(model: ModelConfig, *, padded: bool = True) -> int:
    """All parameters, shared words once; ``padded=False`` leaves out the vocabulary's padding, as papers do."""
    words = 1 if model.tie_embeddings else 2
    words = words if model.electra is None else 1
    row = words * model.hidden_size + (1 if model.bert is not None else 0)  # and its bias
    unpadded = 0 if padded else row * (model.padded_vocab_size - model.known_vocab_size)
    return sum(cost.parameters for cost in layer_costs(model, 1)) - unpadded


def active_parameters(model: ModelConfig, *, padded: bool = True) -> int:
    """Those that a token meets on its way to the next token: its own experts, no layer that looks ahead."""
    if model.moe is None:
        idle = 0.0
    else:
        layers = sum(model.has_experts(layer) for layer in range(model.num_layers))
        idle = layers * routed_parameters(model) * (1 - model.moe.top_k / model.moe.num_experts)
    plain = model.model_copy(update={"mtp": None})
    return round(parameters(plain, padded=padded) - idle)


def train_flops_per_token(
    model: ModelConfig,
    sequence_length: int,
    attention: AttentionCount = "causal",
    *,
    target_length: int | None = None,
) -> float:
    """Model FLOPs of forward and backward for one token, of two stacks the encoder's; see the conventions above."""
    costs = layer_costs(model, sequence_length, attention=attention, target_length=target_length)
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
    more = 0
    if model.bert is not None:
        more = model.bert.token_types * model.hidden_size
        more += norm_parameters(model, model.hidden_size) if model.norms_after else 0
    return word_parameters(model) + positions * model.hidden_size + more


def encoder_head_parameters(model: ModelConfig) -> int:
    """Beside the words: a transform with its norm, a bias for each word, a pooler and two classes."""
    if model.bert is None:
        return 0
    h = model.hidden_size
    pooler = h * h + h + 2 * h + 2 if model.bert.sentence_head else 0
    return h * h + h + norm_parameters(model, h) + model.padded_vocab_size + pooler


def norm_parameters(model: ModelConfig, width: int) -> int:
    return width if model.normalization == "rmsnorm" else 2 * width


def block_parameters(model: ModelConfig, *, has_experts: bool = False) -> int:
    mlp = experts_parameters(model) if has_experts else mlp_parameters(model, model.ffn_width)
    return attention_parameters(model) + mlp + 2 * norm_parameters(model, model.hidden_size)


def attention_parameters(model: ModelConfig) -> int:
    h, q, kv = model.hidden_size, model.query_width, model.kv_width
    mla = model.mla
    if mla is not None:
        n, latent = model.num_attention_heads, mla.kv_lora_rank
        query = h * q
        if mla.q_lora_rank is not None:
            query = mla.q_lora_rank * (h + q) + norm_parameters(model, mla.q_lora_rank)
        keys = (
            h * (latent + mla.qk_rope_head_dim)
            + norm_parameters(model, latent)
            + latent * n * (mla.qk_nope_head_dim + mla.v_head_dim)
        )
        return query + keys + model.value_width * h + (h if model.linear_bias else 0)
    biases = (q + 2 * kv if model.has_qkv_bias else 0) + (h if model.linear_bias else 0)
    head_norms = 2 * norm_parameters(model, model.head_width) if model.qk_norm else 0
    return h * (q + 2 * kv) + q * h + biases + head_norms


def mlp_parameters(model: ModelConfig, width: int) -> int:
    """Two or three matrices, and biases where the model has them."""
    h = model.hidden_size
    fc1 = 2 * width if model.is_gated else width
    return h * fc1 + width * h + (fc1 + h if model.linear_bias else 0)


def routed_parameters(model: ModelConfig) -> int:
    """The experts among which a token's are chosen."""
    assert model.moe is not None
    return model.moe.num_experts * mlp_parameters(model, model.moe.ffn_hidden_size)


def experts_parameters(model: ModelConfig) -> int:
    """Routed and shared experts, router and gate; the balancing bias is no parameter."""
    moe, h = model.moe, model.hidden_size
    assert moe is not None
    shared = mlp_parameters(model, moe.shared_ffn_hidden_size) if moe.shared_ffn_hidden_size else 0
    return routed_parameters(model) + shared + h * moe.num_experts + (h if moe.shared_gate else 0)


def _looking_ahead(model: ModelConfig, block: LayerCost, memory: ActivationMemory) -> LayerCost:
    """A layer of multi-token prediction: a block behind two norms and a projection, a norm at its end."""
    h = model.hidden_size
    norms = 3 * norm_parameters(model, h)
    return LayerCost(
        block.parameters + 2 * h * h + norms,
        block.forward_flops_per_token + 4.0 * h * h,
        block.activation_bytes_per_token + memory.looking_ahead(),
        block.expert_parameters,
        block.again_bytes_per_token,
    )


def block_forward_flops(
    model: ModelConfig,
    sequence_length: int,
    attention: AttentionCount = "causal",
    *,
    has_experts: bool = False,
) -> float:
    """For one token: 2 a weight that it meets, and 2 x keys x width for scores and for values."""
    if attention not in ("causal", "full"):
        raise ModelError(f"attention={attention}: unknown; choose causal or full")
    if not model.is_causal:
        attention = "full"
    moe, h = model.moe, model.hidden_size
    matrices = 3 if model.is_gated else 2
    width = float(model.ffn_width)
    router = 0.0
    if has_experts:
        assert moe is not None
        width = moe.top_k * moe.ffn_hidden_size + (moe.shared_ffn_hidden_size or 0)
        router = 2.0 * h * moe.num_experts
    linears = _attention_linears(model) + 2.0 * matrices * h * width + router
    scores_and_values = 2.0 * (model.query_width + model.value_width)
    return linears + scores_and_values * _mean_keys(sequence_length, model.sliding_window, attention)


def _attention_linears(model: ModelConfig) -> float:
    h, q, kv, mla = model.hidden_size, model.query_width, model.kv_width, model.mla
    if mla is None:
        return 2.0 * (h * (q + 2 * kv) + q * h)
    query = h * q if mla.q_lora_rank is None else mla.q_lora_rank * (h + q)
    heads = model.num_attention_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    keys = h * (mla.kv_lora_rank + mla.qk_rope_head_dim) + mla.kv_lora_rank * heads
    return 2.0 * (query + keys + model.value_width * h)


def _mean_keys(s: int, window: int | None, attention: AttentionCount) -> float:
    """Keys a query meets on average: s, or under the mask s/2 (the published rounding of (s+1)/2), fewer in a
    window.
    """
    if attention == "full":
        return float(s)
    w = min(window or s, s)
    return w - w * w / (2.0 * s)
