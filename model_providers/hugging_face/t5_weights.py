"""The tensors of T5ForConditionalGeneration."""

from collections.abc import Iterator, Sequence

import torch

from model_providers.config import ModelConfig
from model_providers.hugging_face.entries import HALVES, HEAD, HEADS, SAME, VOCABULARY, WORDS, Entry, Join


def entries(model: ModelConfig) -> Iterator[Entry]:
    assert model.t5 is not None
    yield Entry(WORDS, ("shared.weight",), VOCABULARY)
    for index in range(model.t5.num_encoder_layers):
        yield from _block(f"encoder.block.{index}", f"encoder.{index}", model, index, reads=False)
    yield Entry("encoder_norm.norm.weight", ("encoder.final_layer_norm.weight",), SAME)
    for index in range(model.num_layers):
        yield from _block(f"decoder.block.{index}", f"decoder.{index}", model, index, reads=True)
    yield Entry("final_norm.norm.weight", ("decoder.final_layer_norm.weight",), SAME)
    if not model.tie_embeddings:
        yield Entry(HEAD, ("lm_head.weight",), VOCABULARY)


def _block(there: str, here: str, model: ModelConfig, index: int, *, reads: bool) -> Iterator[Entry]:
    own = f"{there}.layer.0.SelfAttention"
    yield Entry(f"{here}.input_layernorm.weight", (f"{there}.layer.0.layer_norm.weight",), SAME)
    heads = tuple(f"{own}.{name}.weight" for name in "qkv")
    yield Entry(f"{here}.self_attention.linear_qkv.weight", heads, HEADS)
    yield Entry(f"{here}.self_attention.linear_proj.weight", (f"{own}.o.weight",), SAME)
    if index == 0:
        yield Entry(f"{here}.relative_bias.weight", (f"{own}.relative_attention_bias.weight",), SAME)
    if reads:
        other = f"{there}.layer.1.EncDecAttention"
        yield Entry(f"{here}.pre_cross_attn_layernorm.weight", (f"{there}.layer.1.layer_norm.weight",), SAME)
        yield Entry(f"{here}.cross_attention.linear_q.weight", (f"{other}.q.weight",), SAME)
        keys = (f"{other}.k.weight", f"{other}.v.weight")
        yield Entry(f"{here}.cross_attention.linear_kv.weight", keys, KEYS_AND_VALUES)
        yield Entry(f"{here}.cross_attention.linear_proj.weight", (f"{other}.o.weight",), SAME)
    last = f"{there}.layer.{2 if reads else 1}"
    dense = f"{last}.DenseReluDense"
    yield Entry(f"{here}.pre_mlp_layernorm.weight", (f"{last}.layer_norm.weight",), SAME)
    if model.is_gated:
        yield Entry(f"{here}.mlp.linear_fc1.weight", (f"{dense}.wi_0.weight", f"{dense}.wi_1.weight"), HALVES)
    else:
        yield Entry(f"{here}.mlp.linear_fc1.weight", (f"{dense}.wi.weight",), SAME)
    yield Entry(f"{here}.mlp.linear_fc2.weight", (f"{dense}.wo.weight",), SAME)


def _join_keys(parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Key [n*d h], value [n*d h] -> [n*2*d h]: of each head its key and its value."""
    heads = [rows.unflatten(0, (model.num_attention_heads, -1)) for rows in parts]
    return torch.cat(heads, dim=1).flatten(0, 1)


def _split_keys(joined: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    heads = joined.unflatten(0, (model.num_attention_heads, -1))  # [n 2*d h]
    return tuple(half.flatten(0, 1) for half in heads.chunk(2, dim=1))


KEYS_AND_VALUES = Join(_join_keys, _split_keys)
