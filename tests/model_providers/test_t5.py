"""T5 computes what transformers computes, from its files and into its files."""

from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from model_providers.config import ModelConfig
from model_providers.hugging_face.architectures import (
    config_to_hugging_face,
    family,
    model_from_hugging_face,
)
from model_providers.hugging_face.weights import weights_from_hugging_face, weights_to_hugging_face
from model_providers.layer_plan import T5Inputs
from model_providers.relative import buckets
from tests.model_providers.plans import Built, build

SIZES = {
    "vocab_size": 100,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_max_distance": 20,
    "dropout_rate": 0.0,
    "initializer_factor": 1.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "t5": {"feed_forward_proj": "relu"},
    "t5-1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def t5(kind: str) -> Any:
    torch.manual_seed(1)
    theirs = T5ForConditionalGeneration(T5Config(**SIZES | KINDS[kind])).eval()
    if kind == "t5-1.1":  # transformers 5 makes them one until a checkpoint says otherwise
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight))
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return theirs


def loaded(theirs: Any) -> tuple[ModelConfig, Built]:
    model = model_from_hugging_face(theirs.config.to_dict())
    built = build(model, sequence_length=24, target_length=10)
    weights = weights_from_hugging_face(theirs.state_dict(), model)
    with torch.no_grad():
        for name, parameter in built.named_parameters().items():
            parameter.copy_(weights[name])
    return model, built


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_padding", [False, True])
def test_logits_are_those_of_transformers(kind: str, has_padding: bool) -> None:
    theirs = t5(kind)
    _, built = loaded(theirs)
    tokens, targets = torch.randint(3, 100, (2, 24)), torch.randint(3, 100, (2, 10))
    real = torch.ones_like(tokens)
    if has_padding:
        real[1, 17:] = 0
    wanted = theirs(input_ids=tokens, attention_mask=real, decoder_input_ids=targets).logits
    segments = (1 - real).int() if has_padding else None
    found = built(T5Inputs(tokens, targets, segments)).transpose(0, 1)[..., :100]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_configuration_come_back(kind: str) -> None:
    theirs = t5(kind)
    model, built = loaded(theirs)
    assert family(model) == "t5"
    back, there = weights_to_hugging_face(built.named_parameters(), model), theirs.state_dict()
    assert all(torch.equal(tensor, there[name]) for name, tensor in back.items())
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert there.keys() - tied <= back.keys()
    again = T5Config(**config_to_hugging_face(model))
    for key in [*SIZES, "feed_forward_proj", "scale_decoder_outputs"]:
        assert getattr(again, key) == getattr(theirs.config, key), key


@pytest.mark.parametrize("is_causal", [False, True])
def test_buckets_are_those_of_transformers(is_causal: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(70)[None] - torch.arange(70)[:, None]
    wanted = T5Attention._relative_position_bucket(
        distance, bidirectional=not is_causal, num_buckets=32, max_distance=50
    )
    assert torch.equal(buckets(70, 70, 32, 50, is_causal, torch.device("cpu")), wanted)
