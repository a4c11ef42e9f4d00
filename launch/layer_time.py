"""How long a rank computes one layer for one micro-batch, and how long its tensor and expert groups talk in it.

Matrix products are timed by their shapes, attention by its arithmetic, everything else by the bytes that it moves.
Forward, gradients of inputs and gradients of weights stand apart, since zero-bubble schedules run them apart.
Models with two stacks or a generator are timed by their FLOPs alone, at the rate of a large product in 16 bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from launch.hardware import Cluster
from launch.links import Group, group
from launch.phases import LayerTime, Phase
from launch.product_time import (
    BYTES,
    FP8_WEIGHT_BYTES,
    MEMORY_SHARE,
    Gemm,
    fp8_gemm_s,
    gemm_s,
    quantised_bytes,
)
from launch.scenario import Scenario
from model_providers.config import ModelConfig
from model_providers.cost import layer_costs
from model_providers.loss_chunks import tokens_of_a_chunk

# Bytes of a backward pass over those of the forward pass in what is bound by memory: a norm reads two and writes one
# where it read one and wrote one, biases and residual sums read once more.
BACKWARD_PASSES = 1.75
# The vocabulary's softmax per logit: 16 bit in, a copy in fp32, its maximum, exponentials and sum; and back.
LOSS_FORWARD_BYTES, LOSS_BACKWARD_BYTES = 22, 12
ATTENTION_BACKWARD = (
    2.5  # five products where forward has two (Dao et al. 2022, arXiv:2205.14135, algorithm 4)
)
# A micro-batch's gradient is read in 16 bit, the sum read and written in fp32.
ACCUMULATE_BYTES = 10
SUM_BYTES = 8  # of a chunk's share of a weight's gradient: the sum in fp32, read and written


@dataclass(frozen=True)
class LayerClock:
    """What times layers of one scenario on one cluster."""

    scenario: Scenario
    cluster: Cluster

    @property
    def tokens(self) -> int:
        return self.scenario.micro_size * self.scenario.sequence_length

    @property
    def shards(self) -> int:
        """Ranks that share out what lies between the matrices."""
        return self.scenario.layout.tp if self.scenario.layout.shards_sequence else 1

    @property
    def bytes_per_value(self) -> int:
        return BYTES[self.scenario.dtype]

    @property
    def tensor_group(self) -> Group:
        return group(self.cluster, size=self.scenario.layout.tp)

    def block(self, model: ModelConfig, *, has_experts: bool = False, is_fp8: bool = False) -> LayerTime:
        """Attention and an MLP, or experts; ``is_fp8``: whose linears run in FP8, but for routers and experts."""
        products = self._attention_linears(model)
        moved = self._between_matrices(model)
        attention = self._core_attention(model)
        time = LayerTime()
        if has_experts:
            products += self._shared_mlp(model)
            time = self._experts(model).plus(self._linears(self._router(model)))
        else:
            products += self._mlp(model, model.ffn_width)
            moved += self._activation_bytes(model, model.ffn_width, self.tokens) / self.scenario.layout.tp
        linears = self._fp8_linears(products) if is_fp8 else self._linears(products)
        time = time.plus(linears).plus(self._moving(moved)).plus(attention)
        time = time.plus(self._tensor_collectives(model, pairs=1 if has_experts else 2))
        linears_of = self._fp8_linears if is_fp8 else self._linears
        return self._recomputed(time, self._forgotten(model, attention, has_experts, linears_of))

    def head(self, model: ModelConfig, *, times: int = 1) -> LayerTime:
        """Logits and the loss on them, of this rank's words."""
        words = model.padded_vocab_size / self.scenario.layout.tp
        time = self._head_products(Gemm(self.tokens, words, model.hidden_size))
        logits = self.tokens * words
        time = time.plus(
            LayerTime(
                forward=self._moved(logits * LOSS_FORWARD_BYTES),
                input_gradient=self._moved(logits * LOSS_BACKWARD_BYTES),
            )
        )
        one = self._reduced(self.tokens * model.hidden_size * self.bytes_per_value)
        talk = LayerTime(input_gradient=Phase(tensor_s=one[0]), tensor_bytes=one[1])
        return LayerTime().plus(time.plus(talk), times)

    def _head_products(self, product: Gemm) -> LayerTime:
        """In chunks the logits are made once more, and the weight's gradient, a sum in fp32, does not wait."""
        time, chunk = self._linears([product]), self.scenario.chunk_tokens
        if chunk is None:
            return time
        num_chunks = math.ceil(product.rows / tokens_of_a_chunk(chunk, round(product.rows)))
        part = self._linears([product._replace(rows=product.rows / num_chunks)])
        sums = self._moved(SUM_BYTES * num_chunks * product.columns * product.depth)
        gradients = part.input_gradient.plus(part.weight_gradient).times(num_chunks).plus(sums)
        made = part.forward.times(num_chunks)
        return LayerTime(forward=made, input_gradient=gradients, recompute=made)

    def embedding(self, model: ModelConfig) -> LayerTime:
        """Rows are copied; the tensor ranks sum them, since each knows its own words."""
        seconds, sent_bytes = self._reduced(self.tokens * model.hidden_size * self.bytes_per_value)
        moved = 3 * self.tokens * model.hidden_size * self.bytes_per_value
        time = self._moving(moved)
        return time.plus(LayerTime(forward=Phase(tensor_s=seconds), tensor_bytes=sent_bytes))

    def norm(self, model: ModelConfig) -> LayerTime:
        return self._moving(2 * self.tokens * model.hidden_size * self.bytes_per_value / self.shards)

    def looking_ahead(self, model: ModelConfig) -> LayerTime:
        """A block behind a projection of two hidden states."""
        block = self.block(model, has_experts=model.moe is not None)
        h = model.hidden_size
        return block.plus(self._linears([Gemm(self.tokens, h / self.scenario.layout.tp, 2 * h)]))

    def by_flops(self, flops_per_token: float, moved_bytes_per_token: float) -> LayerTime:
        """A layer of whose products nothing is known but how much they come to."""
        peak = self.cluster.device.peak_flops_per_s(self.scenario.dtype) * self.cluster.device.gemm_share
        one = Phase(gemm_s=flops_per_token * self.tokens / self.scenario.layout.tp / peak)
        moving = self._moving(moved_bytes_per_token * self.tokens)
        return LayerTime(forward=one, input_gradient=one, weight_gradient=one).plus(moving)

    def accumulating(self, parameters: float) -> LayerTime:
        """A micro-batch's gradients added to those before."""
        return LayerTime(weight_gradient=self._moved(parameters * ACCUMULATE_BYTES))

    def quantising(self, parameters: float) -> LayerTime:
        """Weights of this many elements to eight bits, in one micro-batch: its share of once a step, or in every pass
        where no copy outlives one (fp8/copies.py; `keeps_weights` in fp8/transformer_engine.py).
        """
        scenario, once = self.scenario, self._moved(FP8_WEIGHT_BYTES * parameters)
        assert scenario.fp8 is not None
        repeats = scenario.recompute == "full"
        if scenario.zero_stage == 3 or (repeats and scenario.fp8.backend != "torch"):
            return LayerTime(forward=once, input_gradient=once, recompute=once if repeats else Phase())
        return LayerTime(forward=once.times(1 / scenario.num_micro_batches))

    def _gemm_s(self, products: list[Gemm]) -> float:
        return gemm_s(products, self.cluster.device, self.scenario.dtype)

    def _linears(self, products: list[Gemm]) -> LayerTime:
        return self._three_products(products, self._gemm_s)

    def _fp8_linears(self, products: list[Gemm]) -> LayerTime:
        """Inputs and gradients are quantised besides."""
        dtype, fp8 = self.scenario.dtype, self.scenario.fp8
        assert fp8 is not None
        inputs, outputs = quantised_bytes(products, dtype, fp8)
        quantising = LayerTime(forward=self._moved(inputs), input_gradient=self._moved(outputs))
        seconds = partial(fp8_gemm_s, device=self.cluster.device, dtype=dtype, fp8=fp8)
        return self._three_products(products, seconds).plus(quantising)

    def _three_products(self, products: list[Gemm], seconds: Callable[[list[Gemm]], float]) -> LayerTime:
        backward = [product.backward() for product in products]
        return LayerTime(
            forward=Phase(gemm_s=seconds(products)),
            input_gradient=Phase(gemm_s=seconds([inputs for inputs, _ in backward])),
            weight_gradient=Phase(gemm_s=seconds([weights for _, weights in backward])),
        )

    def _moved(self, moved_bytes: float) -> Phase:
        return Phase(memory_s=moved_bytes / (self.cluster.device.memory_bytes_per_s * MEMORY_SHARE))

    def _moving(self, forward_bytes: float) -> LayerTime:
        forward = self._moved(forward_bytes)
        return LayerTime(forward=forward, input_gradient=forward.times(BACKWARD_PASSES))

    def _attention_linears(self, model: ModelConfig) -> list[Gemm]:
        t, h, tp = self.tokens, model.hidden_size, self.scenario.layout.tp
        output = Gemm(t, h, model.value_width / tp)
        mla = model.mla
        if mla is None:
            return [Gemm(t, (model.query_width + 2 * model.kv_width) / tp, h), output]
        queries = [Gemm(t, model.query_width / tp, h)]
        if mla.q_lora_rank is not None:
            queries = [Gemm(t, mla.q_lora_rank, h), Gemm(t, model.query_width / tp, mla.q_lora_rank)]
        heads = model.num_attention_heads * (mla.qk_nope_head_dim + mla.v_head_dim) / tp
        keys = [Gemm(t, mla.kv_lora_rank + mla.qk_rope_head_dim, h), Gemm(t, heads, mla.kv_lora_rank)]
        return [*queries, *keys, output]

    def _mlp(self, model: ModelConfig, width: float) -> list[Gemm]:
        t, h, local = self.tokens, model.hidden_size, width / self.scenario.layout.tp
        return [Gemm(t, local * (2 if model.is_gated else 1), h), Gemm(t, h, local)]

    def _shared_mlp(self, model: ModelConfig) -> list[Gemm]:
        assert model.moe is not None
        shared = model.moe.shared_ffn_hidden_size
        return self._mlp(model, shared) if shared else []

    def _router(self, model: ModelConfig) -> list[Gemm]:
        assert model.moe is not None
        return [Gemm(self.tokens / self.shards, model.moe.num_experts, model.hidden_size)]

    def _between_matrices(self, model: ModelConfig) -> float:
        """Bytes of a forward pass: two norms, two sums with dropout, and queries, keys and values turned or moved."""
        h, size = model.hidden_size, self.bytes_per_value
        mask = 1 if model.hidden_dropout else 0
        norms_and_sums = 2 * (2 * size * h + 3 * size * h + mask * h) / self.shards
        heads = 2 * size * (model.query_width + 2 * model.kv_width) / self.scenario.layout.tp
        return self.tokens * (norms_and_sums + heads)

    def _activation_bytes(self, model: ModelConfig, width: float, rows: float) -> float:
        return rows * width * self.bytes_per_value * (3 if model.is_gated else 2)

    def _core_attention(self, model: ModelConfig) -> LayerTime:
        if self.scenario.fused:
            return self._fused_attention(model)
        return self._written_attention(model)

    def _fused_attention(self, model: ModelConfig) -> LayerTime:
        """Scores never leave the chip, and what a mask hides is not computed."""
        s, device = self.scenario.sequence_length, self.cluster.device
        window = min(model.sliding_window or s, s)
        keys = window - window * window / (2.0 * s) if model.is_causal else float(s)
        flops = 2.0 * self.tokens * keys * (model.query_width + model.value_width) / self.scenario.layout.tp
        one = Phase(
            attention_s=flops / (device.peak_flops_per_s(self.scenario.dtype) * device.attention_share)
        )
        return LayerTime(forward=one, input_gradient=one.times(ATTENTION_BACKWARD))

    def _written_attention(self, model: ModelConfig) -> LayerTime:
        """Batched products, a fused softmax and a dropout that read and write all s x s scores, masked or not."""
        s, size = self.scenario.sequence_length, self.bytes_per_value
        heads = self.scenario.micro_size * model.num_attention_heads / self.scenario.layout.tp
        products = [
            Gemm(s, s, model.query_width / model.num_attention_heads, heads),
            Gemm(s, model.value_width / model.num_attention_heads, s, heads),
        ]
        forward_s = self._gemm_s(products)
        drops = 2 * size + 1 if model.attention_dropout else 0
        scores = heads * s * s
        forward = self._moved(scores * (2 * size + drops))
        backward = self._moved(scores * (3 * size + drops))
        return LayerTime(
            forward=Phase(attention_s=forward_s + forward.total_s),
            input_gradient=Phase(attention_s=2 * forward_s + backward.total_s),
        )

    def _tensor_collectives(self, model: ModelConfig, *, pairs: int) -> LayerTime:
        """One sum behind each half of a block, and one more on the way back (Shoeybi et al. 2019, section 3).

        Under sequence parallelism each is a reduce-scatter and an all-gather, which take as long (Korthikanti et al.
        2022, section 4.2.2).
        """
        seconds, sent_bytes = self._reduced(self.tokens * model.hidden_size * self.bytes_per_value)
        one = Phase(tensor_s=pairs * seconds)
        return LayerTime(forward=one, input_gradient=one, tensor_bytes=2 * pairs * sent_bytes)

    def _reduced(self, whole_bytes: float) -> tuple[float, float]:
        """Seconds and bytes sent of one sum over the tensor group."""
        ranks = self.tensor_group
        return ranks.all_reduce_s(whole_bytes), 2 * ranks.gather_bytes(whole_bytes)

    def _experts(self, model: ModelConfig) -> LayerTime:
        """For a balanced router: tokens go to their experts' ranks and come back, twice."""
        moe, layout, size = model.moe, self.scenario.layout, self.bytes_per_value
        assert moe is not None
        own_rows = self.tokens / layout.tp * moe.top_k  # what this rank's share of the sequence sends out
        rows, local = own_rows * layout.expert_tp, max(1, moe.num_experts // layout.ep)
        width = moe.ffn_hidden_size / layout.expert_tp
        columns = width * (2 if model.is_gated else 1)
        products = [
            Gemm(rows / local, columns, model.hidden_size, local),
            Gemm(rows / local, model.hidden_size, width, local),
        ]
        sorting = 4 * 2 * own_rows * model.hidden_size * size  # rows sorted by rank and by expert, and back
        time = self._linears(products).plus(
            self._moving(sorting + self._activation_bytes(model, width, rows))
        )
        ep_group = group(self.cluster, size=layout.ep, stride=layout.expert_tp)
        etp_group = group(self.cluster, size=layout.expert_tp)
        sent_bytes = own_rows * model.hidden_size * size
        once_s = ep_group.all_to_all_s(sent_bytes) + etp_group.gather_s(sent_bytes * layout.expert_tp)
        both_ways = Phase(expert_s=2 * once_s)
        once_bytes = ep_group.gather_bytes(sent_bytes) + etp_group.gather_bytes(sent_bytes * layout.expert_tp)
        talk = LayerTime(forward=both_ways, input_gradient=both_ways, expert_bytes=4 * once_bytes)
        return time.plus(talk)

    def _forgotten(
        self,
        model: ModelConfig,
        attention: LayerTime,
        has_experts: bool,
        linears_of: Callable[[list[Gemm]], LayerTime],
    ) -> LayerTime:
        """What selective recompute computes again."""
        wide, names = (
            2 * self.tokens * model.hidden_size * self.bytes_per_value,
            self.scenario.recompute_modules,
        )
        size, layout, moe = self.bytes_per_value, self.scenario.layout, model.moe
        parts = [attention] if "core_attn" in names else []
        if "layernorm" in names:
            parts.append(self._moving(2 * wide / self.shards))
        if "mla_up_proj" in names and model.mla is not None:
            heads = (
                model.query_width + model.num_attention_heads * model.mla.qk_nope_head_dim + model.value_width
            )
            parts.append(linears_of([Gemm(self.tokens, heads / layout.tp, model.mla.kv_lora_rank)]))
        if has_experts and moe is not None:
            if "moe" in names:
                parts += [self._experts(model), self._linears(self._router(model))]
                parts.append(linears_of(self._shared_mlp(model)))
            if "moe_act" in names:
                rows = self.tokens * moe.top_k / layout.tp
                parts.append(self._moving(self._activation_bytes(model, moe.ffn_hidden_size, rows)))
            if "shared_experts" in names and moe.shared_ffn_hidden_size:
                parts.append(linears_of(self._mlp(model, moe.shared_ffn_hidden_size)))
        elif "mlp" in names:
            talk = self._reduced(self.tokens * model.hidden_size * size)
            parts.append(linears_of(self._mlp(model, model.ffn_width)))
            parts.append(
                self._moving(self._activation_bytes(model, model.ffn_width, self.tokens) / layout.tp)
            )
            parts.append(LayerTime(forward=Phase(tensor_s=talk[0])))
        total = LayerTime()
        for part in parts:
            total = total.plus(part)
        return total

    def _recomputed(self, time: LayerTime, forgotten: LayerTime) -> LayerTime:
        mode = self.scenario.recompute
        if mode == "none":
            return time
        again = time.forward if mode == "full" else forgotten.forward
        half = 0.5 if mode == "full" else 0.0  # collectives of forward passes are half of all
        return time._replace(
            recompute=again,
            tensor_bytes=time.tensor_bytes * (1 + half),
            expert_bytes=time.expert_bytes * (1 + half),
        )


def is_timed_by_flops(model: ModelConfig) -> bool:
    return model.t5 is not None or model.electra is not None


def layer_times(scenario: Scenario, cluster: Cluster) -> list[LayerTime]:
    """In the order of the plan, as model_providers.cost.layer_costs has them."""
    clock, model, fp8 = LayerClock(scenario, cluster), scenario.model, scenario.fp8
    if is_timed_by_flops(model):
        return _by_flops(clock)
    kinds = [
        (model.has_experts(layer), fp8 is not None and fp8.is_fp8_block(layer, model.num_layers))
        for layer in range(model.num_layers)
    ]
    timed = {kind: clock.block(model, has_experts=kind[0], is_fp8=kind[1]) for kind in set(kinds)}
    blocks = [timed[kind] for kind in kinds]
    ahead = model.mtp.depth if model.mtp is not None else 0
    looking = [clock.looking_ahead(model)] * ahead
    norms = [] if model.norms_after else [clock.norm(model)]
    return [clock.embedding(model), *blocks, *norms, *looking, clock.head(model, times=1 + ahead)]


def _by_flops(clock: LayerClock) -> list[LayerTime]:
    scenario = clock.scenario
    costs = layer_costs(
        scenario.model,
        scenario.sequence_length,
        target_length=scenario.target_length,
        tp=scenario.layout.tp,
        sequence_parallel=scenario.layout.shards_sequence,
        bytes_per_value=clock.bytes_per_value,
    )
    return [clock.by_flops(cost.forward_flops_per_token, cost.activation_bytes_per_token) for cost in costs]
