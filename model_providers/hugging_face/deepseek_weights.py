"""The tensors of DeepseekV2ForCausalLM and DeepseekV3ForCausalLM: latent attention, shared experts, a look ahead.

Two things to know.  Their turned dimensions are paired with their neighbours, ours half a width apart; rows are put
in order on the way.  And transformers leaves out what looks ahead; the released files have it as further layers, with
copies of embedding and head.
"""

from collections.abc import Iterator

from model_providers.config import ModelConfig
from model_providers.hugging_face.entries import (
    HEAD,
    SAME,
    TURNED_KEYS,
    TURNED_QUERIES,
    VOCABULARY,
    WORDS,
    Entry,
)
from model_providers.hugging_face.llama_weights import LIST_OF_EXPERTS, ends, expert_entries, mlp, norms


def entries(model: ModelConfig) -> Iterator[Entry]:
    yield from ends(model)
    for layer in range(model.num_layers):
        yield from _block(f"model.layers.{layer}", f"layers.{layer}", model, model.has_experts(layer))
    for depth in range(model.mtp.depth if model.mtp is not None else 0):
        there, here = f"model.layers.{model.num_layers + depth}", f"mtp.{depth}"
        yield Entry(WORDS, (f"{there}.embed_tokens.weight",), VOCABULARY)
        head = WORDS if model.tie_embeddings else HEAD
        yield Entry(head, (f"{there}.shared_head.head.weight",), VOCABULARY)
        for ours, theirs in (
            ("enorm", "enorm"),
            ("hnorm", "hnorm"),
            ("eh_proj", "eh_proj"),
            ("final_layernorm", "shared_head.norm"),
        ):
            yield Entry(f"{here}.{ours}.weight", (f"{there}.{theirs}.weight",), SAME)
        yield from _block(there, f"{here}.transformer_layer", model, model.moe is not None)


def _block(there: str, here: str, model: ModelConfig, has_experts: bool) -> Iterator[Entry]:
    yield from norms(there, here)
    yield from _attention(f"{there}.self_attn", f"{here}.self_attention", model)
    if not has_experts:
        yield from mlp(f"{there}.mlp", f"{here}.mlp", model)
        return
    router, experts, names = LIST_OF_EXPERTS
    yield from expert_entries(f"{there}.{router}", f"{there}.{experts}", f"{here}.mlp", names, model)
    yield from mlp(f"{there}.mlp.shared_experts", f"{here}.mlp.shared_experts", model)
    if model.moe is not None and model.moe.balances_by_bias:
        yield Entry(f"{here}.mlp.router.expert_bias", (f"{there}.{router}.e_score_correction_bias",), SAME)


def _attention(there: str, here: str, model: ModelConfig) -> Iterator[Entry]:
    assert model.mla is not None
    if model.mla.q_lora_rank is None:
        yield Entry(f"{here}.linear_q_proj.weight", (f"{there}.q_proj.weight",), TURNED_QUERIES)
    else:
        yield Entry(f"{here}.linear_q_down_proj.weight", (f"{there}.q_a_proj.weight",), SAME)
        yield Entry(f"{here}.q_layernorm.weight", (f"{there}.q_a_layernorm.weight",), SAME)
        yield Entry(f"{here}.linear_q_up_proj.weight", (f"{there}.q_b_proj.weight",), TURNED_QUERIES)
    yield Entry(f"{here}.linear_kv_down_proj.weight", (f"{there}.kv_a_proj_with_mqa.weight",), TURNED_KEYS)
    yield Entry(f"{here}.kv_layernorm.weight", (f"{there}.kv_a_layernorm.weight",), SAME)
    yield Entry(f"{here}.linear_kv_up_proj.weight", (f"{there}.kv_b_proj.weight",), SAME)
    yield Entry(f"{here}.linear_proj.weight", (f"{there}.o_proj.weight",), SAME)
