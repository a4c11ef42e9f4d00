"""Bytes of activations that a layer keeps for its backward pass, per token, on one rank of the tensor group.

Two accountings.  ``fused=True`` is this room's portable layers, term by term, and a test counts what autograd
really stores.  ``fused=False`` is the paper's layer, whose attention writes its scores (Korthikanti et al.
2022, arXiv:2205.05198, section 4).  Left out of the first: dropout inside attention on the CPU, with which
torch 2.13 leaves the fused kernel and keeps the scores too.

Experts are counted for a balanced router without dropped tokens: a rank then keeps as many rows as its own tokens
have experts, whatever ep is.
"""

from typing import Literal, NamedTuple

from model_providers.config import ModelConfig
from model_providers.moe_config import MoEConfig

RecomputeMode = Literal["none", "selective", "full"]
# What ``selective`` may forget, in megatron-core's words (transformer_config.py, recompute_modules).
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts", "mla_up_proj")

# Widths of the MLP kept between its two linears, the second one's input included, in multiples of ffn_width.
KEPT_FFN_WIDTHS = {
    "gelu": 2,  # input and output of the activation
    "gelu_tanh": 2,
    "relu": 1,  # its output tells where it was positive
    "squared_relu": 2,
    "swiglu": 3,  # gate, up, and their product; silu(gate) is computed again
    "geglu": 4,  # and gelu(gate)
    "geglu_tanh": 4,
}


def is_there(module: str, model: ModelConfig) -> bool:
    """Whether a model has such parts as selective recompute forgets under this name."""
    has_experts = [model.has_experts(layer) for layer in range(model.num_layers)]
    return {
        "core_attn": True,
        "layernorm": not model.norms_after,
        "mlp": not all(has_experts),
        "moe": any(has_experts),
        "moe_act": any(has_experts),
        "shared_experts": model.moe is not None and bool(model.moe.shared_ffn_hidden_size),
        "mla_up_proj": model.mla is not None,
    }[module]


class ActivationMemory(NamedTuple):
    model: ModelConfig
    sequence_length: int
    recompute: RecomputeMode
    tp: int
    sequence_parallel: bool
    bytes_per_value: int
    fused: bool
    etp: int  # ranks that share an expert's matrices
    modules: tuple[str, ...] = ("core_attn",)  # that selective recompute forgets
    chunked_loss: bool = False
    eight_bits: float | None = None  # bytes of a number of a linear's input, where a block runs in FP8
    has_fp8_experts: bool = False  # whether routed experts run in FP8 too

    def embedding(self) -> float:
        """Its dropout's mask, and the token's id."""
        h, types = self.model.hidden_size, 8 if self.model.bert is not None else 0
        norm = self.bytes_per_value * h + self._statistics() if self.model.norms_after else 0
        return (self._mask(self.model.hidden_dropout) * h + norm) / self._shards() + 8 + types

    def block(self, *, has_experts: bool = False) -> float:
        if self.recompute == "full":
            return self.bytes_per_value * self.model.hidden_size / self._shards()  # 2 sbh: the input alone
        attention = self._latent_projections() if self.model.mla is not None else self._projections()
        if not self._forgets("core_attn"):
            attention += self._core_attention()
        if self._forgets("moe" if has_experts else "mlp"):
            mlp = 0.0
        else:
            mlp = self._experts() if has_experts else self._mlp(self.model.ffn_width) / self.tp
        saved = self._saved_by_eight_bits(has_experts=has_experts)
        return self._norms_and_residual() / self._shards() + attention / self.tp + mlp - saved

    def _saved_by_eight_bits(self, *, has_experts: bool) -> float:
        """What is not kept because linears keep their inputs in eight bits (fp8/linears.py, fp8/experts.py)."""
        if self.eight_bits is None:
            return 0.0
        m, mla = self.model, self.model.mla
        total = self._of_row_input(m.query_width if mla is None else m.value_width)
        if mla is None:
            total += self._of_normed_input()
        else:
            latents = [rank for rank in (mla.q_lora_rank, mla.kv_lora_rank) if rank is not None]
            total += sum(self._of_column_input(rank) for rank in latents) + self._of_latents_input()
        if has_experts:
            return total + self._saved_by_experts()
        if self._forgets("mlp"):
            return total
        is_kept_anyway = m.activation == "relu"  # whose output tells where it was positive
        middle = self._of_row_input(m.ffn_width)
        if is_kept_anyway:
            middle -= self.bytes_per_value * m.ffn_width / self.tp
        return total + self._of_normed_input() + middle

    def _of_latents_input(self) -> float:
        """Two linears read the norm's output and keep a copy each; only one that is cut keeps a shard as it is."""
        assert self.eight_bits is not None and self.model.mla is not None
        width, shards = self.model.hidden_size, self._shards()
        is_shard_kept = shards > 1 and not self.model.mla.q_lora_rank
        copies = self.eight_bits * (1 if is_shard_kept else 2)
        is_let_go = not is_shard_kept and not self._forgets("layernorm")
        return ((self.bytes_per_value if is_let_go else 0) - copies) * width / shards

    def _saved_by_experts(self) -> float:
        """Routed experts keep copies of their tokens; shared ones read what the router keeps anyway."""
        m, moe = self.model, self.model.moe
        assert self.eight_bits is not None and moe is not None
        if self._forgets("moe"):
            return 0.0
        total, each = 0.0, self.bytes_per_value - self.eight_bits
        if self.has_fp8_experts:
            middle = -self.eight_bits if self._forgets("moe_act") else each
            row = each * m.hidden_size + middle * moe.ffn_hidden_size / self.etp
            total += moe.top_k * self.etp / self.tp * row
        if moe.shared_ffn_hidden_size and not self._forgets("shared_experts"):
            total += self._of_row_input(moe.shared_ffn_hidden_size)
            total -= self.eight_bits * m.hidden_size if self._shards() == 1 else 0
        return total

    def _of_row_input(self, width: int) -> float:
        assert self.eight_bits is not None
        return (self.bytes_per_value - self.eight_bits) * width / self.tp

    def _of_column_input(self, width: int) -> float:
        """Of every token whole; under sequence parallelism this rank's tokens stay as they are."""
        assert self.eight_bits is not None
        return 0.0 if self._shards() > 1 else (self.bytes_per_value - self.eight_bits) * width

    def _of_normed_input(self) -> float:
        """Where selective recompute forgets a norm's output, its eight-bit copy is kept besides."""
        is_forgotten = self._forgets("layernorm") and self._shards() == 1
        kept_besides = self.bytes_per_value * self.model.hidden_size if is_forgotten else 0
        return self._of_column_input(self.model.hidden_size) - kept_besides

    def again(self, *, has_experts: bool = False) -> float:
        """The most of a block that selective recompute brings back at once.

        The half of the MLP comes back first, and has gone, with what was kept of it, when the attention's does.
        """
        if self.recompute != "selective":
            return 0.0

        def forgotten(*modules: str, by: tuple[str, ...] = self.modules) -> float:
            chosen = tuple(name for name in modules if name in by)
            whole = self._replace(recompute="none").block(has_experts=has_experts)
            return whole - self._replace(modules=chosen).block(has_experts=has_experts)

        norm = forgotten("layernorm") / 2
        mlp = forgotten("mlp", "moe", "moe_act", "shared_experts")
        kept_of_mlp = forgotten("mlp", "moe", by=RECOMPUTE_MODULES) - mlp
        attention = forgotten("core_attn", "mla_up_proj") + norm
        return max(mlp + norm, attention - kept_of_mlp)

    def looking_ahead(self) -> float:
        """Two norms, their outputs side by side, and the norm at the end."""
        h = self.model.hidden_size
        return (5 * self.bytes_per_value * h + 3 * self._statistics()) / self._shards()

    def reading_queries(self) -> float:
        """Of a decoder's attention to an encoder, for each of its own tokens: a norm, queries, and what came out."""
        if self.recompute == "full":
            return 0.0
        m, core = self.model, 0.0
        if not self._forgets("core_attn"):  # without a bias: fused, and its output is the projection's input
            core = 4 * m.num_attention_heads if self.fused else self._core_attention()
        norm = 2 * self.bytes_per_value * m.hidden_size + self._statistics()
        saved = 0.0
        if self.eight_bits is not None:
            saved = self._of_normed_input() + self._of_row_input(m.query_width)
        return norm / self._shards() + (2 * self.bytes_per_value * m.query_width + core) / self.tp - saved

    def reading_keys(self) -> float:
        """For each of the encoder's tokens; what the encoder made is kept once for all layers."""
        if self.recompute == "full":
            return 0.0
        has_copy = self.eight_bits is not None and self._shards() == 1
        copy = (self.eight_bits or 0.0) * self.model.hidden_size if has_copy else 0.0
        return 2 * self.bytes_per_value * self.model.kv_width / self.tp + copy

    def final_norm(self) -> float:
        return (self.bytes_per_value * self.model.hidden_size + self._statistics()) / self._shards()

    def head(self) -> float:
        """Its input, and the logits of this rank's share of the vocabulary (in fp32 in the paper, section 4.3).

        In chunks, a log-sum-exp, a label and a weight stand for a token's logits.
        """
        logits = (self.bytes_per_value if self.fused else 4) * self.model.padded_vocab_size / self.tp
        if self.chunked_loss:
            logits = 4 + 8 + 4
        kept = self.bytes_per_value * self.model.hidden_size
        if self.model.bert is not None:  # the transform, its activation and its norm
            kept += 3 * self.bytes_per_value * self.model.hidden_size + self._statistics()
        return kept / self._shards() + logits

    def _forgets(self, module: str) -> bool:
        return self.recompute == "selective" and module in self.modules

    def _shards(self) -> int:
        return self.tp if self.sequence_parallel else 1

    def _mask(self, dropout: float) -> int:
        """Bytes of a dropout mask's entry, as CUDA stores it."""
        return 1 if dropout else 0

    def _statistics(self) -> int:
        """What a norm remembers of each token: the inverse deviation, LayerNorm also the mean."""
        if not self.fused:
            return 0
        return 4 if self.model.normalization == "rmsnorm" else 2 * self.bytes_per_value

    def _norms_and_residual(self) -> float:
        """Input and output of both norms and two dropout masks: 10 h in the paper."""
        h, mask = self.model.hidden_size, self._mask(self.model.hidden_dropout)
        if self._forgets("layernorm"):
            return 2 * (self.bytes_per_value * h + mask * h)
        return 2 * (2 * self.bytes_per_value * h + mask * h + self._statistics())

    def _projections(self) -> float:
        """Query, key, value, and the output projection's input: 8 h in the paper."""
        m = self.model
        kept = 2 * m.query_width + 2 * m.kv_width
        statistics = 0
        if m.qk_norm:  # queries and keys before the norm stay too, and each head's statistics
            kept += m.query_width + m.kv_width
            statistics = (m.num_attention_heads + m.kv_heads) * self._statistics()
        return self.bytes_per_value * kept + statistics

    def _latent_projections(self) -> float:
        """As above, and both latents before and after their norms.

        Values are kept as the attention takes them, filled up to the keys' width; else with what they were split from.
        """
        m, mla = self.model, self.model.mla
        assert mla is not None
        is_filled_up = mla.v_head_dim < mla.qk_head_dim and not self._forgets("core_attn")
        if self._forgets("mla_up_proj"):
            filled = m.num_attention_heads * mla.qk_head_dim if is_filled_up else 0
            whole = self.bytes_per_value * (mla.kv_lora_rank + (mla.q_lora_rank or 0))
            turned = self.bytes_per_value * mla.qk_rope_head_dim * self.tp
            return self.bytes_per_value * (filled + m.value_width) + whole * self.tp / self._shards() + turned
        values = mla.qk_head_dim if is_filled_up else mla.qk_nope_head_dim + mla.v_head_dim
        heads = self.bytes_per_value * (2 * m.query_width + m.num_attention_heads * values + m.value_width)
        ranks = [rank for rank in (mla.q_lora_rank, mla.kv_lora_rank) if rank is not None]
        latents = sum(2 * self.bytes_per_value * rank + self._statistics() for rank in ranks)
        return heads + latents * self.tp / self._shards()

    def _mlp(self, width: int) -> float:
        """Between the two linears: 16 h in the paper."""
        return float(self.bytes_per_value * KEPT_FFN_WIDTHS[self.model.activation] * width)

    def _experts(self) -> float:
        m, moe = self.model, self.model.moe
        assert moe is not None
        # Gated SiLU takes the router's weights along; other activations are kept before they are weighed too.
        again = 0 if m.activation == "swiglu" else self.bytes_per_value * moe.ffn_hidden_size
        middle = self._mlp(moe.ffn_hidden_size) + again
        if self._forgets("moe_act"):
            middle = self.bytes_per_value * (2 if m.is_gated else 1) * moe.ffn_hidden_size
        row = self.bytes_per_value * m.hidden_size + middle / self.etp + 4
        rows = moe.top_k * self.etp / self.tp
        shared = 0.0
        if moe.shared_ffn_hidden_size and not self._forgets("shared_experts"):
            shared = self._mlp(moe.shared_ffn_hidden_size) / self.tp
            if moe.shared_gate:
                shared += self.bytes_per_value * (m.hidden_size + 1) / self._shards()
        return rows * row + shared + self._routing(moe) / self._shards()

    def _routing(self, moe: MoEConfig) -> float:
        """The choice and its places, scores, and what each balance loss looks at: about, but for plain softmax."""
        scores = 4 * moe.num_experts
        kept = scores + moe.num_experts + 20 * moe.top_k
        if moe.score == "sigmoid" or not moe.normalize_top_k:
            kept += scores
        if moe.num_groups is not None and moe.group_top_k is not None:
            kept += moe.num_experts + 8 * (moe.num_groups * (moe.top_k // moe.group_top_k) + moe.group_top_k)
        losses = (moe.aux_loss, moe.sequence_aux_loss, moe.global_aux_loss, moe.z_loss)
        return float(kept + scores * sum(loss > 0 for loss in losses))

    def _core_attention(self) -> float:
        """5 a s in the paper: scores, probabilities, a mask.  Fused: its output, a log-sum-exp for each head."""
        m = self.model
        if self.fused and m.position_embedding == "relative":
            # A bias with a gradient leaves the fused kernel: probabilities stay, and what comes out is the
            # projection's input.
            return self.bytes_per_value * m.num_attention_heads * self.sequence_length
        if self.fused:
            return self.bytes_per_value * m.query_width + 4 * m.num_attention_heads
        dropped = (1 + self.bytes_per_value) * self._mask(m.attention_dropout)
        return m.num_attention_heads * self.sequence_length * (self.bytes_per_value + dropped)
