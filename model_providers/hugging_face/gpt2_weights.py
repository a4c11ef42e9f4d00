"""GPT2LMHeadModel's tensors: its linears are transposed (Conv1D), and queries, keys and values joined by thirds."""

from collections.abc import Iterator, Sequence

import torch

from model_providers.config import ModelConfig
from model_providers.hugging_face.entries import (
    SAME,
    TRANSPOSED,
    VOCABULARY,
    WORDS,
    Entry,
    Join,
    join_heads,
    split_heads,
)

NORMS = {"ln_1": "input_layernorm", "ln_2": "pre_mlp_layernorm"}
LINEARS = {
    "attn.c_attn": "self_attention.linear_qkv",
    "attn.c_proj": "self_attention.linear_proj",
    "mlp.c_fc": "mlp.linear_fc1",
    "mlp.c_proj": "mlp.linear_fc2",
}


def _heads_from_thirds(parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    return join_heads(parts[0].chunk(3), model)


def _thirds_from_heads(tensor: torch.Tensor, model: ModelConfig) -> Sequence[torch.Tensor]:
    return (torch.cat(split_heads(tensor, model)),)


THIRDS = Join(_heads_from_thirds, _thirds_from_heads)
TRANSPOSED_THIRDS = Join(
    lambda parts, model: _heads_from_thirds([parts[0].t()], model).contiguous(),
    lambda tensor, model: (_thirds_from_heads(tensor, model)[0].t(),),
)


def entries(model: ModelConfig) -> Iterator[Entry]:
    yield Entry(WORDS, ("transformer.wte.weight",), VOCABULARY)
    yield Entry("embedding.position_embeddings.weight", ("transformer.wpe.weight",), SAME)
    for part in ("weight", "bias"):
        yield Entry(f"final_norm.norm.{part}", (f"transformer.ln_f.{part}",), SAME)
    for layer in range(model.num_layers):
        for part in ("weight", "bias"):
            for theirs, ours in NORMS.items():
                yield Entry(
                    f"layers.{layer}.{ours}.{part}", (f"transformer.h.{layer}.{theirs}.{part}",), SAME
                )
            for theirs, ours in LINEARS.items():
                name = f"transformer.h.{layer}.{theirs}.{part}"
                yield Entry(f"layers.{layer}.{ours}.{part}", (name,), _join(theirs, part))


def _join(theirs: str, part: str) -> Join:
    if theirs == "attn.c_attn":
        return TRANSPOSED_THIRDS if part == "weight" else THIRDS
    return TRANSPOSED if part == "weight" else SAME
