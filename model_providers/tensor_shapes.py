"""The shape of every parameter of a layer, in the order in which modules list them; no torch.

What an optimizer keeps may depend on shapes (a row and a column of statistics, a few columns of a projection, blocks of
256 elements), and so an estimate of it does.  A test compares with built models.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from model_providers.config import ModelConfig


class TensorShape(NamedTuple):
    """Of one parameter on one tensor rank."""

    lengths: tuple[int, ...]
    is_hidden: bool = False  # a matrix inside a block: neither embedding nor head
    is_embedding: bool = False  # of the first layer, or a head that reads its words
    is_expert: bool = False

    @property
    def elements(self) -> int:
        product = 1
        for length in self.lengths:
            product *= length
        return product

    @property
    def is_matrix(self) -> bool:
        return len(self.lengths) >= 2


@lru_cache(maxsize=256)
def layer_shapes(
    model: ModelConfig, *, tp: int = 1, ep: int = 1, etp: int = 1
) -> tuple[tuple[TensorShape, ...], ...]:
    """In the order of the plan; shared words count in the embedding."""
    builder = _Shapes(model, tp, ep, etp)
    return tuple(tuple(shapes) for shapes in builder.layers())


def word_shape(model: ModelConfig, tp: int) -> TensorShape:
    """The table of words, or a copy of it."""
    return TensorShape((model.padded_vocab_size // tp, model.hidden_size), is_embedding=True)


class _Shapes(NamedTuple):
    model: ModelConfig
    tp: int
    ep: int
    etp: int

    def layers(self) -> Iterator[list[TensorShape]]:
        m = self.model
        if m.electra is not None:
            yield from self._electra()
            return
        if m.t5 is not None:
            yield from self._stacks()
            return
        yield self._embedding()
        for index in range(m.num_layers):
            yield self._block(has_experts=m.has_experts(index))
        if not m.norms_after:
            yield self._norm(m.hidden_size)
        for _ in range(m.mtp.depth if m.mtp is not None else 0):
            h = m.hidden_size
            norms = [*self._norm(h), *self._norm(h), *self._norm(h)]
            yield [*norms, _matrix(h // self.tp, 2 * h), *self._block(has_experts=m.moe is not None)]
        yield self._head()

    def _stacks(self) -> Iterator[list[TensorShape]]:
        """Encoder and decoder of a T5; tables of distances are in each stack's first layer."""
        m = self.model
        assert m.t5 is not None
        table = [TensorShape((m.t5.relative_buckets, m.num_attention_heads // self.tp), is_hidden=True)]
        tables = table if m.position_embedding == "relative" else []
        yield [word_shape(m, self.tp)]
        for index in range(m.t5.num_encoder_layers):
            yield [*self._block(), *(tables if index == 0 else [])]
        yield self._norm(m.hidden_size)
        yield []
        for index in range(m.num_layers):
            yield [*self._block(is_reading=True), *(tables if index == 0 else [])]
        yield self._norm(m.hidden_size)
        yield self._head()

    def _electra(self) -> Iterator[list[TensorShape]]:
        m, small = self.model, self.model.generator
        h, g = m.hidden_size, small.hidden_size
        yield [
            *self._embedding(has_types=False),
            *self._norm(h),
            TensorShape((g, h), is_embedding=True),
            TensorShape((g,), is_embedding=True),
        ]
        inner = _Shapes(small, self.tp, 1, 1)
        for _ in range(small.num_layers):
            yield inner._block()
        yield [
            _vector(m.padded_vocab_size // self.tp),
            _matrix(h, g),
            _vector(h),
            *self._norm(h),
            *self._norm(h),
        ]
        for _ in range(m.num_layers):
            yield self._block()
        if not m.norms_after:
            yield self._norm(h)
        yield [TensorShape((h, h)), _vector(h), TensorShape((1, h)), _vector(1)]

    def _embedding(self, *, has_types: bool = True) -> list[TensorShape]:
        m, h = self.model, self.model.hidden_size
        found = [word_shape(m, self.tp)]
        if m.position_embedding == "learned":
            found.append(TensorShape((m.max_sequence_length, h), is_embedding=True))
        if m.bert is not None and has_types:
            if m.bert.token_types:
                found.append(TensorShape((m.bert.token_types, h), is_embedding=True))
            found += self._norm(h) if m.norms_after else []
        return found

    def _head(self) -> list[TensorShape]:
        m, h = self.model, self.model.hidden_size
        words = [] if m.tie_embeddings else [word_shape(m, self.tp)._replace(is_embedding=False)]
        if m.bert is None:
            return words
        found = [
            *words,
            _vector(m.padded_vocab_size // self.tp),
            TensorShape((h, h)),
            _vector(h),
            *self._norm(h),
        ]
        if m.bert.sentence_head:
            found += [TensorShape((h, h)), _vector(h), TensorShape((2, h)), _vector(2)]
        return found

    def _block(self, *, has_experts: bool = False, is_reading: bool = False) -> list[TensorShape]:
        m, h = self.model, self.model.hidden_size
        norm = self._norm(h)
        attention = self._attention() if m.mla is None else self._latent()
        reading = [*norm, *self._reading()] if is_reading else []
        mlp = self._experts() if has_experts else self._mlp(m.ffn_width)
        return (
            [*attention, *mlp, *norm, *norm] if m.norms_after else [*norm, *attention, *reading, *norm, *mlp]
        )

    def _norm(self, width: int) -> list[TensorShape]:
        return [_vector(width)] * (1 if self.model.normalization == "rmsnorm" else 2)

    def _projection(self) -> list[TensorShape]:
        """Back to the width; its bias is whole on every rank."""
        m = self.model
        bias = [_vector(m.hidden_size)] if m.linear_bias else []
        return [_matrix(m.hidden_size, m.value_width // self.tp), *bias]

    def _attention(self) -> list[TensorShape]:
        m = self.model
        width = (m.query_width + 2 * m.kv_width) // self.tp
        bias = [_vector(width)] if m.has_qkv_bias else []
        norms = [*self._norm(m.head_width), *self._norm(m.head_width)] if m.qk_norm else []
        return [*self._projection(), _matrix(width, m.hidden_size), *bias, *norms]

    def _reading(self) -> list[TensorShape]:
        """A decoder's attention to what the encoder made."""
        m, h = self.model, self.model.hidden_size
        found = self._projection()
        for width in (m.query_width // self.tp, 2 * m.kv_width // self.tp):
            found += [_matrix(width, h), *([_vector(width)] if m.has_qkv_bias else [])]
        return found

    def _latent(self) -> list[TensorShape]:
        m, h, mla = self.model, self.model.hidden_size, self.model.mla
        assert mla is not None
        found = self._projection()
        if mla.q_lora_rank is None:
            found.append(_matrix(m.query_width // self.tp, h))
        else:
            found += [_matrix(mla.q_lora_rank, h), _matrix(m.query_width // self.tp, mla.q_lora_rank)]
        keys = m.num_attention_heads * (mla.qk_nope_head_dim + mla.v_head_dim) // self.tp
        found += [_matrix(mla.kv_lora_rank + mla.qk_rope_head_dim, h), _matrix(keys, mla.kv_lora_rank)]
        ranks = [rank for rank in (mla.q_lora_rank, mla.kv_lora_rank) if rank is not None]
        return found + [shape for rank in ranks for shape in self._norm(rank)]

    def _mlp(self, width: int) -> list[TensorShape]:
        m, h = self.model, self.model.hidden_size
        inner = (2 if m.is_gated else 1) * width // self.tp
        biases = ([_vector(inner)], [_vector(h)]) if m.linear_bias else ([], [])
        return [_matrix(inner, h), *biases[0], _matrix(h, width // self.tp), *biases[1]]

    def _experts(self) -> list[TensorShape]:
        m, h, moe = self.model, self.model.hidden_size, self.model.moe
        assert moe is not None
        number, width = moe.num_experts // self.ep, moe.ffn_hidden_size // self.etp
        inner = (2 if m.is_gated else 1) * width
        found = [_matrix(moe.num_experts, h)]
        for lengths in ((number, inner, h), (number, h, width)):
            found.append(TensorShape(lengths, is_hidden=True, is_expert=True))
        if moe.shared_ffn_hidden_size:
            found += [_matrix(1, h)] if moe.shared_gate else []
            found += self._mlp(moe.shared_ffn_hidden_size)
        return found


def _matrix(rows: int, columns: int) -> TensorShape:
    return TensorShape((rows, columns), is_hidden=True)


def _vector(length: int) -> TensorShape:
    return TensorShape((length,))
