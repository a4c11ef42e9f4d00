"""The tensors of LlamaForCausalLM, and those that Mixtral and Qwen3-MoE have in place of its MLP's."""

from collections.abc import Iterator

from model_providers.config import ModelConfig
from model_providers.hugging_face.entries import (
    EXPERTS,
    GATED_EXPERTS,
    HALVES,
    HEAD,
    HEADS,
    SAME,
    VOCABULARY,
    WORDS,
    Entry,
)

NORMS = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"}
# A layer's experts, under its prefix: router, then each expert's gate, up and down.
MIXTRAL_EXPERTS = ("block_sparse_moe.gate", "block_sparse_moe.experts", ("w1", "w3", "w2"))
LIST_OF_EXPERTS = ("mlp.gate", "mlp.experts", ("gate_proj", "up_proj", "down_proj"))


def entries(model: ModelConfig) -> Iterator[Entry]:
    yield from ends(model)
    for layer in range(model.num_layers):
        there, here = f"model.layers.{layer}", f"layers.{layer}"
        yield from norms(there, here)
        yield from attention(there, here, model)
        yield from mlp(f"{there}.mlp", f"{here}.mlp", model)


def mixtral_entries(model: ModelConfig) -> Iterator[Entry]:
    yield from _with_experts(model, *MIXTRAL_EXPERTS)


def qwen3_moe_entries(model: ModelConfig) -> Iterator[Entry]:
    yield from _with_experts(model, *LIST_OF_EXPERTS)


def _with_experts(
    model: ModelConfig, router: str, experts: str, names: tuple[str, str, str]
) -> Iterator[Entry]:
    yield from ends(model)
    for layer in range(model.num_layers):
        there, here = f"model.layers.{layer}", f"layers.{layer}"
        yield from norms(there, here)
        yield from attention(there, here, model)
        if model.has_experts(layer):
            yield from expert_entries(f"{there}.{router}", f"{there}.{experts}", f"{here}.mlp", names, model)
        else:
            yield from mlp(f"{there}.mlp", f"{here}.mlp", model)


def ends(model: ModelConfig) -> Iterator[Entry]:
    """Embedding, final norm and head."""
    yield Entry(WORDS, ("model.embed_tokens.weight",), VOCABULARY)
    yield Entry("final_norm.norm.weight", ("model.norm.weight",), SAME)
    if not model.tie_embeddings:
        yield Entry(HEAD, ("lm_head.weight",), VOCABULARY)


def norms(there: str, here: str) -> Iterator[Entry]:
    for theirs, ours in NORMS.items():
        yield Entry(f"{here}.{ours}.weight", (f"{there}.{theirs}.weight",), SAME)


def attention(there: str, here: str, model: ModelConfig) -> Iterator[Entry]:
    there, here = f"{there}.self_attn", f"{here}.self_attention"
    for part in ("weight", "bias") if model.has_qkv_bias else ("weight",):
        names = tuple(f"{there}.{name}_proj.{part}" for name in "qkv")
        yield Entry(f"{here}.linear_qkv.{part}", names, HEADS)
    for part in ("weight", "bias") if model.linear_bias else ("weight",):
        yield Entry(f"{here}.linear_proj.{part}", (f"{there}.o_proj.{part}",), SAME)
    for name in ("q", "k") if model.qk_norm else ():
        yield Entry(f"{here}.{name}_layernorm.weight", (f"{there}.{name}_norm.weight",), SAME)


def mlp(there: str, here: str, model: ModelConfig) -> Iterator[Entry]:
    for part in ("weight", "bias") if model.linear_bias else ("weight",):
        names = (f"{there}.gate_proj.{part}", f"{there}.up_proj.{part}")
        yield Entry(f"{here}.linear_fc1.{part}", names, HALVES)
        yield Entry(f"{here}.linear_fc2.{part}", (f"{there}.down_proj.{part}",), SAME)


def expert_entries(
    router: str, experts: str, here: str, names: tuple[str, str, str], model: ModelConfig
) -> Iterator[Entry]:
    """``names``: of an expert's gate, up and down projections."""
    assert model.moe is not None
    gate, up, down = names
    numbers = range(model.moe.num_experts)
    first = tuple(f"{experts}.{number}.{name}.weight" for number in numbers for name in (gate, up))
    second = tuple(f"{experts}.{number}.{down}.weight" for number in numbers)
    yield Entry(f"{here}.router.weight", (f"{router}.weight",), SAME)
    yield Entry(f"{here}.experts.linear_fc1.weight", first, GATED_EXPERTS)
    yield Entry(f"{here}.experts.linear_fc2.weight", second, EXPERTS)
