"""The presets have the published numbers of parameters."""

import pytest

from model_providers.cost import active_parameters, block_parameters, parameters
from model_providers.errors import ModelError
from model_providers.presets import PRESETS, get_preset, model_from

# Exact: what transformers counts in the released checkpoints.
EXACT = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
    "bert-base": 110_106_428,
    "bert-large": 336_226_108,
    "roberta-base": 124_697_433
    - 2 * 768,  # transformers' table of positions has two rows that nothing asks for
    "roberta-large": 355_412_057 - 2 * 1024,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "deepseek-v2-lite": 15_706_484_224,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}
EXACT_WITHOUT_MTP = {"deepseek-v3": 671_026_404_352}
# As printed, in billions: what a token meets.
ACTIVE = {
    "mixtral-8x7b": 12.9,
    "mixtral-8x22b": 39.1,
    "deepseek-v3": 37.5,
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22.1,
    "llama3-8b": 8.03,
}
# As printed, in billions, with the tolerance that the printing leaves.
PRINTED = {
    "gpt3-125m": 0.125,
    "gpt3-350m": 0.356,
    "gpt3-760m": 0.760,
    "gpt3-1.3b": 1.3,
    "gpt3-2.7b": 2.7,
    "gpt3-6.7b": 6.7,
    "gpt3-13b": 13.0,
    "gpt3-175b": 175.0,
    "megatron-1.7b": 1.7,
    "megatron-3.6b": 3.6,
    "megatron-7.5b": 7.5,
    "megatron-18b": 18.4,
    "megatron-39b": 39.1,
    "megatron-76b": 76.1,
    "megatron-145b": 145.6,
    "megatron-310b": 310.1,
    "megatron-530b": 529.6,
    "megatron-1t": 1008.0,
    "megatron-bert-336m": 0.336,
    "megatron-bert-1.3b": 1.3,
    "megatron-bert-3.9b": 3.9,
}


@pytest.mark.parametrize("name", EXACT)
def test_released_models_are_counted_exactly(name: str) -> None:
    assert parameters(get_preset(name), padded=False) == EXACT[name]


@pytest.mark.parametrize("name", EXACT_WITHOUT_MTP)
def test_what_looks_ahead_is_counted_apart(name: str) -> None:
    """The released model_type counts none; the paper: 14B more with its copies of the vocabulary, 11.6B without."""
    model = get_preset(name)
    plain = model.model_copy(update={"mtp": None})
    assert parameters(plain, padded=False) == EXACT_WITHOUT_MTP[name]
    assert 11e9 < parameters(model) - parameters(plain) < 12e9


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_as_printed(name: str) -> None:
    assert active_parameters(get_preset(name), padded=False) / 1e9 == pytest.approx(ACTIVE[name], rel=0.02)


@pytest.mark.parametrize("name", PRINTED)
def test_printed_sizes_are_met(name: str) -> None:
    tolerance = 0.03 if name.startswith(("megatron-1.7b", "megatron-bert", "gpt3")) else 0.011
    assert parameters(get_preset(name), padded=False) / 1e9 == pytest.approx(PRINTED[name], rel=tolerance)


@pytest.mark.parametrize(("name", "printed"), [("electra-base", 110e6), ("electra-large", 335e6)])
def test_an_electra_without_its_generator_has_the_printed_size(name: str, printed: float) -> None:
    """Clark et al. 2020, table 1 and section 3.4."""
    model = get_preset(name)
    generator = model.generator.num_layers * block_parameters(model.generator)
    assert parameters(model, padded=False) - generator == pytest.approx(printed, rel=0.01)


def test_megatron_formula_of_table_1() -> None:
    """P = 12 l h^2 (1 + 13 / 12h + (V + s) / 12lh), Narayanan et al. 2021, equation 2; it forgets the last
    norm, 2h.
    """
    for name in PRINTED:
        model = get_preset(name)
        if name.startswith("megatron") and model.bert is None:
            layers, h = model.num_layers, model.hidden_size
            formula = (
                12 * layers * h**2
                + 13 * layers * h
                + (model.known_vocab_size + model.max_sequence_length) * h
            )
            assert parameters(model) == formula + 2 * h


def test_every_preset_is_tested_or_ours() -> None:
    ours = {
        "tiny",
        "demo",
        "tiny-moe",
        "demo-moe",
        "tiny-deepseek",
        "electra-base",
        "electra-large",
        "tiny-bert",
        "tiny-electra",
        "demo-bert",
        "tiny-t5",
        "demo-t5",
    }
    assert set(PRESETS) == {*EXACT, *EXACT_WITHOUT_MTP, *PRINTED, *ours}


def test_the_demo_is_small_and_modern() -> None:
    demo = get_preset("demo")
    assert 5e6 <= parameters(demo) <= 10e6
    assert (demo.normalization, demo.position_embedding, demo.activation) == ("rmsnorm", "rotary", "swiglu")
    assert demo.kv_heads < demo.num_attention_heads and demo.vocab_size == 1024


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(
        ModelError, match=r"preset=lama3-8b: unknown; did you mean llama3-8b\? known: tiny, demo"
    ):
        get_preset("lama3-8b")
    with pytest.raises(ModelError, match="preset=zzz: unknown; known: tiny"):
        get_preset("zzz")


def test_facts_go_on_top_of_a_preset() -> None:
    model = model_from({"num_layers": 3}, preset="gpt2-124m")
    assert (model.num_layers, model.hidden_size) == (3, 768)
    with pytest.raises(ModelError, match="num_layers: missing; give it, or name a preset"):
        model_from({"hidden_size": 8, "num_attention_heads": 1})
