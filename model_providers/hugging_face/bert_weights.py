"""The tensors of BertForPreTraining, RobertaForMaskedLM and MegatronBertForPreTraining."""

from collections.abc import Iterator

import torch

from model_providers.config import ModelConfig
from model_providers.hugging_face.bert import FIRST_POSITION
from model_providers.hugging_face.entries import HEAD, HEADS, SAME, VOCABULARY, WORDS, Entry, Join

PARTS = ("weight", "bias")
# RoBERTa's table begins with rows that no token of a text asks for.
SHIFTED = Join(
    lambda parts, model: parts[0][FIRST_POSITION:],
    lambda tensor, model: (torch.cat((tensor.new_zeros(FIRST_POSITION, tensor.size(1)), tensor)),),
)


def entries(model: ModelConfig) -> Iterator[Entry]:
    yield from _encoder("bert", model, SAME)
    yield from _head(
        model, "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions"
    )
    for part in PARTS:
        yield Entry(f"head.pooler.{part}", (f"bert.pooler.dense.{part}",), SAME)
        yield Entry(f"head.sentence.{part}", (f"cls.seq_relationship.{part}",), SAME)


def roberta_entries(model: ModelConfig) -> Iterator[Entry]:
    yield from _encoder("roberta", model, SHIFTED)
    yield from _head(model, "lm_head.dense", "lm_head.layer_norm", "lm_head")


def _encoder(prefix: str, model: ModelConfig, positions: Join) -> Iterator[Entry]:
    there = f"{prefix}.embeddings"
    yield Entry(WORDS, (f"{there}.word_embeddings.weight",), VOCABULARY)
    yield Entry("embedding.position_embeddings.weight", (f"{there}.position_embeddings.weight",), positions)
    yield Entry("embedding.type_embeddings.weight", (f"{there}.token_type_embeddings.weight",), SAME)
    for part in PARTS:
        if model.norms_after:
            yield Entry(f"embedding.norm.{part}", (f"{there}.LayerNorm.{part}",), SAME)
        else:
            yield Entry(f"final_norm.norm.{part}", (f"{prefix}.encoder.ln.{part}",), SAME)
    for layer in range(model.num_layers):
        norms = NORMS_AFTER if model.norms_after else NORMS_BEFORE
        yield from _block(f"{prefix}.encoder.layer.{layer}", f"layers.{layer}", norms)


NORMS_AFTER = (("attention_norm", "attention.output.LayerNorm"), ("mlp_norm", "output.LayerNorm"))
NORMS_BEFORE = (("input_layernorm", "attention.ln"), ("pre_mlp_layernorm", "ln"))


def _block(there: str, here: str, norms: tuple[tuple[str, str], ...]) -> Iterator[Entry]:
    for part in PARTS:
        heads = tuple(f"{there}.attention.self.{name}.{part}" for name in ("query", "key", "value"))
        yield Entry(f"{here}.self_attention.linear_qkv.{part}", heads, HEADS)
        for ours, theirs in (
            ("self_attention.linear_proj", "attention.output.dense"),
            ("mlp.linear_fc1", "intermediate.dense"),
            ("mlp.linear_fc2", "output.dense"),
            *norms,
        ):
            yield Entry(f"{here}.{ours}.{part}", (f"{there}.{theirs}.{part}",), SAME)


def _head(model: ModelConfig, transform: str, norm: str, end: str) -> Iterator[Entry]:
    for part in PARTS:
        yield Entry(f"head.transform.{part}", (f"{transform}.{part}",), SAME)
        yield Entry(f"head.norm.{part}", (f"{norm}.{part}",), SAME)
    yield Entry("head.bias", (f"{end}.bias",), VOCABULARY)
    if not model.tie_embeddings:
        yield Entry(HEAD, (f"{end}.decoder.weight",), VOCABULARY)
