"""With Hugging Face's weights we compute Hugging Face's logits and gradients, and give the weights back
unchanged.
"""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from model_providers.config import ModelConfig
from model_providers.errors import ModelError
from model_providers.hugging_face.architectures import (
    config_to_hugging_face,
    family,
    model_from_hugging_face,
)
from model_providers.hugging_face.weights import weights_from_hugging_face, weights_to_hugging_face
from model_providers.layer_plan import Targets
from model_providers.presets import get_preset
from tests.model_providers.plans import (
    Built,
    assert_same_tensors,
    build,
    gpt2_like,
    llama_like,
    loss_and_gradients,
)

LENGTH = 48  # beyond the original length that the scaled rotary variants below were "trained" with

LLAMA = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 10000.0},
    "base": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn, given attention factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
        "beta_fast": 16.0,
        "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
}


def llama(**facts: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**LLAMA | facts)).eval()


def gpt2(**facts: Any) -> GPT2LMHeadModel:
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 100,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.1,
    }
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes | no_dropout | facts)).eval()
    for name, parameter in model.named_parameters():  # biases and norms are drawn trivially: make them matter
        if name.endswith("bias") or "ln_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def load(theirs: Any) -> tuple[ModelConfig, Built]:
    model = model_from_hugging_face(theirs.config.to_dict())
    built = build(model, sequence_length=LENGTH)
    weights = weights_from_hugging_face(theirs.state_dict(), model)
    with torch.no_grad():
        for name, parameter in built.named_parameters().items():
            parameter.copy_(weights.pop(name))
    assert set(weights) <= {"head.weight"}
    return model, built


def assert_parity(theirs: Any) -> None:
    """Logits, loss and the gradient of every parameter, within 1e-4 relative."""
    model, built = load(theirs)
    tokens = torch.randint(0, 100, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    logits = theirs(inputs).logits
    ours = built(inputs).transpose(0, 1)[..., : model.known_vocab_size]  # [s b v] -> [b s v]
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())

    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    targets = Targets(labels, torch.full(labels.shape, 1.0 / labels.numel()))
    found, gradients = loss_and_gradients(built, inputs, targets)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert_same_tensors(weights_to_hugging_face(gradients, model), wanted, relative=1e-4)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_llama_with_grouped_heads_equals_hugging_face(rope: dict[str, Any]) -> None:
    assert_parity(llama(rope_parameters=rope))


@pytest.mark.parametrize(
    "facts",
    [{"num_key_value_heads": 4}, {"num_key_value_heads": 1, "head_dim": 16}, {"tie_word_embeddings": True}],
    ids=["all heads", "multi-query and wide heads", "tied"],
)
def test_llama_variants_equal_hugging_face(facts: dict[str, Any]) -> None:
    assert_parity(llama(**facts))


def test_llama_with_biases_equals_hugging_face() -> None:
    theirs = llama(attention_bias=True, mlp_bias=True)
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.1)
    assert_parity(theirs)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_gpt2_equals_hugging_face(activation: str) -> None:
    assert_parity(gpt2(activation_function=activation))


@pytest.mark.parametrize(
    "theirs", [llama, gpt2, lambda: llama(tie_word_embeddings=True)], ids=["llama", "gpt2", "tied"]
)
def test_weights_come_back_unchanged(theirs: Any) -> None:
    module = theirs()
    state = module.state_dict()
    model = model_from_hugging_face(module.config.to_dict())
    back = weights_to_hugging_face(weights_from_hugging_face(state, model), model)
    assert back.keys() == {name for name in state if name != "lm_head.weight" or not model.tie_embeddings}
    assert all(torch.equal(back[name], state[name]) for name in back)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_an_exported_llama_config_means_the_same(rope: dict[str, Any]) -> None:
    model = model_from_hugging_face(LlamaConfig(**LLAMA | {"rope_parameters": rope}).to_dict())
    exported = LlamaConfig(**config_to_hugging_face(model))
    assert model_from_hugging_face(exported.to_dict()) == model


def test_an_exported_gpt2_config_means_the_same() -> None:
    model = gpt2_like(ffn_hidden_size=128)
    exported = GPT2Config(**config_to_hugging_face(model))
    assert model_from_hugging_face(exported.to_dict()) == model


def test_old_style_rope_scaling_is_read() -> None:
    old = LLAMA | {
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    model = model_from_hugging_face(old)
    assert model.rotary_base == 5e5 and model.rope_scaling is not None and model.rope_scaling.factor == 2.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bloom"}, "model_type=bloom"),
        ({"model_type": "gpt2", "activation_function": "swish"}, "activation_function=swish"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention=True"),
        (LLAMA | {"model_type": "llama", "hidden_act": "gelu"}, "hidden_act=gelu"),
        (LLAMA | {"model_type": "llama", "attention_bias": True}, "attention_bias and mlp_bias differ"),
        (
            LLAMA | {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type=dynamic",
        ),
    ],
)
def test_what_cannot_be_converted_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_from_hugging_face(config)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (llama_like(qk_norm=True), "qk_norm=True"),
        (llama_like(rotary_fraction=0.5), "rotary_fraction=0.5"),
        (llama_like(qkv_bias=True), "qkv_bias=True"),
        (gpt2_like(tie_embeddings=False), "tie_embeddings=False"),
        (gpt2_like(num_kv_heads=2), "heads that do not fill"),
        (gpt2_like(activation="squared_relu"), "activation=squared_relu"),
    ],
)
def test_a_model_without_hugging_face_form_says_why(model: ModelConfig, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        family(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (llama_like(attention="prefix"), r"not Llama \(attention=prefix\)"),
        (get_preset("tiny-electra"), r"model\.electra: a generator and an encoder are no architecture"),
    ],
)
def test_what_would_be_lost_is_not_exported(model: ModelConfig, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        family(model)
