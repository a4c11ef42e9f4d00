"""Every option of ModelConfig does something, and gradients reach every parameter that it brings."""

from typing import Any

import pytest
import torch

from model_providers.config import ModelConfig
from model_providers.random_streams import seed_streams
from tests.model_providers.plans import GPT2_LIKE, LLAMA_LIKE, batch, build, loss_and_gradients

# An option with its other value, on top of the Llama-like or the GPT-2-like model.
ON_LLAMA: dict[str, Any] = {
    "head_dim": 12,
    "num_kv_heads": 4,
    "ffn_hidden_size": 64,
    "rotary_base": 100.0,
    "rotary_fraction": 0.5,
    "norm_eps": 0.1,
    "linear_bias": True,
    "qkv_bias": True,
    "qk_norm": True,
    "sliding_window": 3,
    "tie_embeddings": False,
    "hidden_dropout": 0.5,
    "attention_dropout": 0.5,
    "init_std": 0.2,
    "scale_residual_init": False,
}
OTHER_VALUES = (
    [("llama", {key: value}) for key, value in ON_LLAMA.items()]
    + [("llama", {"position_embedding": kind}) for kind in ("learned", "none")]
    + [("llama", {"activation": kind}) for kind in ("geglu", "gelu", "gelu_tanh", "relu", "squared_relu")]
    + [("llama", {"normalization": "layernorm"}), ("gpt2", {"normalization": "rmsnorm"})]
    + [("gpt2", {"activation": kind}) for kind in ("swiglu", "relu")]
    + [
        ("gpt2", {"position_embedding": "rotary"}),
        ("gpt2", {"num_kv_heads": 2}),
        ("gpt2", {"linear_bias": False}),
    ]
    + [
        ("llama", {"rope_scaling": {"kind": "linear", "factor": 4.0}}),
        ("llama", {"rope_scaling": {"kind": "llama3", "original_max_positions": 8}}),
        ("llama", {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_positions": 8}}),
    ]
)
BASES = {"llama": LLAMA_LIKE, "gpt2": GPT2_LIKE}


def logits_and_gradients(facts: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = ModelConfig(**facts)
    built = build(model)
    inputs, targets = batch(model)
    for name, parameter in built.named_parameters().items():
        if name.endswith("bias"):  # zero at first, and then no different from absent
            torch.nn.init.constant_(parameter, 0.3)
    seed_streams(1)
    logits = built(inputs).detach()
    seed_streams(1)
    return logits, loss_and_gradients(built, inputs, targets)[1]


@pytest.mark.parametrize(("base", "change"), OTHER_VALUES, ids=str)
def test_the_option_changes_the_output_and_gradients_flow(base: str, change: dict[str, Any]) -> None:
    logits, gradients = logits_and_gradients(BASES[base] | change)
    assert not torch.allclose(logits, logits_and_gradients(BASES[base])[0], atol=1e-4)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, f"the gradient of {name} is zero"


def test_dropout_rests_in_evaluation() -> None:
    model = ModelConfig(**LLAMA_LIKE | {"hidden_dropout": 0.5, "attention_dropout": 0.5})
    dropping, plain = build(model), build(ModelConfig(**LLAMA_LIKE))
    dropping.layers.eval()
    inputs, _ = batch(model)
    torch.testing.assert_close(dropping(inputs), plain(inputs))


@pytest.mark.parametrize("facts", [{}, {"sliding_window": 3}], ids=["rotary table", "window"])
def test_what_an_evaluation_made_serves_training(facts: dict[str, Any]) -> None:
    """Tables and masks first made in inference mode could not be saved for a backward pass."""
    model = ModelConfig(**LLAMA_LIKE | facts)
    built = build(model, sequence_length=23)
    inputs, targets = batch(model, length=23)
    with torch.inference_mode():
        built(inputs)
    loss_and_gradients(built, inputs, targets)


def test_padding_the_vocabulary_changes_no_number() -> None:
    """Neither the loss nor a gradient: what 120 tokens padded to 128, 256 or not at all have in common."""
    results = []
    for multiple in (1, 128, 256):
        model = ModelConfig(**LLAMA_LIKE | {"pad_vocab_to_multiple_of": multiple, "tie_embeddings": False})
        built = build(model)
        with torch.no_grad():
            for name in ("embedding.word_embeddings.weight", "head.weight"):
                weight = built.named_parameters()[name]
                weight[:120] = torch.linspace(-1, 1, 120 * 32).reshape(120, 32).sin()
                weight[120:] = 50.0
        loss, gradients = loss_and_gradients(built, *batch(model))
        assert (gradients["head.weight"][120:] == 0).all()
        results.append((loss, {name: g[:120] if g.size(0) >= 120 else g for name, g in gradients.items()}))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        for name, gradient in gradients.items():
            # Relative to the largest: a sum of as many terms has their rounding, however small it is itself.
            wanted = results[0][1][name]
            assert (gradient - wanted).abs().max() <= 2e-6 * wanted.abs().max(), name
