"""Facts are checked with their limits, and what follows from them is derived."""

from typing import Any

import pytest
from pydantic import ValidationError

from model_providers.config import ModelConfig, YarnScaling
from model_providers.errors import ModelError
from model_providers.presets import get_preset, model_from
from tests.model_providers.plans import llama_like

BAD_FACTS = [
    ({"num_attention_heads": 5, "num_kv_heads": 5}, "num_attention_heads=5: does not divide hidden_size=32"),
    ({"num_kv_heads": 3}, r"num_kv_heads=3: must divide num_attention_heads=4; choose one of \[1, 2, 4\]"),
    ({"head_dim": 7}, "rotary_fraction=1.0: turns 7 of head_dim=7"),
    ({"rotary_fraction": 0.1}, "rotary_fraction=0.1: turns 0 of head_dim=8"),
    (
        {"position_embedding": "learned", "rope_scaling": {"kind": "linear", "factor": 2}},
        "rope_scaling=linear: has no effect with position_embedding=learned",
    ),
    (
        {"rope_scaling": {"kind": "llama3", "high_freq_factor": 1.0}},
        "rope_scaling.high_freq_factor=1.0: must be above",
    ),
    (
        {"rope_scaling": {"kind": "yarn", "factor": 2, "original_max_positions": 8, "beta_fast": 1}},
        "rope_scaling.beta_fast=1.0: must be above",
    ),
    ({"hidden_size": 0}, "hidden_size=0: Input should be greater than 0"),
    ({"activation": "swish"}, "activation=swish: Input should be"),
    ({"num_layer": 3}, r"num_layer=3: unknown key; did you mean num_layers\?"),
    ({"colour": "red"}, "colour=red: unknown key; remove it"),
    ({"rope_scaling": {"kind": "yarn"}}, "rope_scaling.yarn.factor: missing"),
]


MOE = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 16}
MLA = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
BAD_EXPERTS: list[tuple[dict[str, Any], str]] = [
    ({"moe": MOE | {"top_k": 9}}, "moe.top_k=9: there are moe.num_experts=8; choose at most that"),
    ({"moe": MOE | {"first_dense": 2}}, "moe.first_dense=2, moe.every=1: none of num_layers=2 is left"),
    ({"moe": MOE | {"num_groups": 4}}, "moe.num_groups and moe.group_top_k: give both, or none"),
    ({"moe": MOE | {"num_groups": 3, "group_top_k": 1}}, "groups must divide moe.num_experts=8"),
    (
        {"moe": MOE | {"num_groups": 8, "group_top_k": 1}},
        "moe.top_k=2: moe.group_top_k=1 groups hold only 1 experts",
    ),
    (
        {"moe": MOE | {"score": "sigmoid", "normalize_top_k": False}},
        "megatron-core always makes them add up to 1",
    ),
    ({"moe": MOE | {"top_k": 1}}, "the one expert's weight would always be 1"),
    ({"moe": MOE | {"bias_update_rate": 0.1}}, "use score=sigmoid, or 0"),
    ({"moe": MOE | {"pad_to_capacity": True}}, "give moe.capacity_factor"),
    ({"moe": MOE, "linear_bias": True}, "experts have no biases here"),
    ({"moe": MOE | {"shared_gate": True}}, "give moe.shared_ffn_hidden_size"),
    ({"mla": MLA, "qk_norm": True}, "num_kv_heads=2, qk_norm=True with mla"),
    ({"mtp": {}, "position_embedding": "learned"}, "use position_embedding=rotary or none"),
    ({"moe": MOE | {"num_expert": 3}}, "moe.num_expert=3: unknown key"),
]


@pytest.mark.parametrize(("facts", "message"), BAD_EXPERTS, ids=[str(facts) for facts, _ in BAD_EXPERTS])
def test_facts_of_experts_that_disagree_are_named(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_from(facts, preset="tiny")


@pytest.mark.parametrize(
    ("moe", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"first_dense": 2}, [2, 3, 4, 5]),
        ({"every": 2}, [1, 3, 5]),
        ({"first_dense": 1, "every": 3}, [3]),
    ],
)
def test_which_layers_have_experts(moe: dict[str, Any], layers: list[int]) -> None:
    model = llama_like(num_layers=6, moe=MOE | moe)
    assert [layer for layer in range(6) if model.has_experts(layer)] == layers
    assert model.num_expert_layers == len(layers)


def test_widths_of_latent_attention() -> None:
    model = llama_like(num_kv_heads=None, mla=MLA, mtp={"depth": 2})
    assert (model.query_width, model.value_width, model.rotary_width) == (4 * 12, 4 * 8, 4)
    assert model.score_scale == pytest.approx(12**-0.5) and model.num_plan_layers == 2 + 3 + 2
    yarn = {"kind": "yarn", "factor": 4.0, "original_max_positions": 8, "mscale_all_dim": 1.0}
    stretched = llama_like(num_kv_heads=None, mla=MLA, rope_scaling=yarn)
    assert stretched.score_scale == pytest.approx(12**-0.5 * 1.1386294**2)


@pytest.mark.parametrize(("facts", "message"), BAD_FACTS, ids=[str(facts) for facts, _ in BAD_FACTS])
def test_a_wrong_fact_is_named_with_its_limit(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_from(facts, preset="tiny")


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ModelError) as told:
        model_from({"num_kv_heads": 3, "head_dim": 7}, preset="tiny")
    assert "num_kv_heads=3" in str(told.value) and "head_dim=7" in str(told.value)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        get_preset("tiny").num_layers = 3  # type: ignore[misc]


def test_unknown_vocabulary_is_allowed_until_it_is_needed() -> None:
    model = llama_like(vocab_size=None)
    with pytest.raises(ModelError, match="vocab_size=None"):
        _ = model.padded_vocab_size


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 128), (128, 128), (129, 256), (50257, 50304)])
def test_the_vocabulary_is_rounded_up(vocab_size: int, padded: int) -> None:
    assert llama_like(vocab_size=vocab_size).padded_vocab_size == padded


def test_the_width_of_the_mlp_follows_from_the_activation() -> None:
    plain = {"num_layers": 1, "hidden_size": 768, "num_attention_heads": 12}
    assert ModelConfig(**plain, activation="gelu").ffn_width == 3072
    assert ModelConfig(**plain, activation="swiglu").ffn_width == 2048
    assert (
        ModelConfig(**plain | {"hidden_size": 4096, "num_attention_heads": 32}).ffn_width == 11008
    )  # Llama-2-7b
    assert ModelConfig(**plain, ffn_hidden_size=100).ffn_width == 100


def test_derived_widths() -> None:
    model = llama_like(num_kv_heads=2, head_dim=12, rotary_fraction=0.5)
    assert (model.query_width, model.kv_width, model.heads_per_group, model.rotary_width) == (48, 24, 2, 6)
    assert llama_like(num_kv_heads=None).kv_heads == 4
    assert llama_like(qkv_bias=True).has_qkv_bias and llama_like(linear_bias=True).has_qkv_bias


def test_yarn_scales_cos_and_sin_as_the_paper_says() -> None:
    assert YarnScaling(factor=1.0, original_max_positions=8).cos_sin_scale == 1.0
    assert YarnScaling(factor=4.0, original_max_positions=8).cos_sin_scale == pytest.approx(1.1386294)
    assert YarnScaling(factor=4.0, original_max_positions=8, attention_factor=2.0).cos_sin_scale == 2.0
    both = YarnScaling(factor=4.0, original_max_positions=8, mscale=1.0, mscale_all_dim=1.0)
    assert both.cos_sin_scale == 1.0
