"""BERT and RoBERTa compute what transformers computes, and what a tensor rank holds adds up to one process."""

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForPreTraining,
    MegatronBertConfig,
    MegatronBertForPreTraining,
    RobertaConfig,
    RobertaForMaskedLM,
)

from model_providers.config import ModelConfig
from model_providers.hugging_face.architectures import (
    config_to_hugging_face,
    family,
    model_from_hugging_face,
)
from model_providers.hugging_face.weights import weights_from_hugging_face, weights_to_hugging_face
from model_providers.layer_plan import BERTInputs
from tests.model_providers.plans import Built, build

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert() -> Any:
    return BertForPreTraining(BertConfig(**SIZES))


def megatron() -> Any:
    return MegatronBertForPreTraining(MegatronBertConfig(**SIZES))


def roberta() -> Any:
    return RobertaForMaskedLM(RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1))


def loaded(theirs: Any) -> tuple[ModelConfig, Built]:
    model = model_from_hugging_face(theirs.config.to_dict())
    built = build(model, sequence_length=24)
    weights = weights_from_hugging_face(theirs.state_dict(), model)
    with torch.no_grad():
        for name, parameter in built.named_parameters().items():
            parameter.copy_(weights[name])
    return model, built


def random_norms(theirs: Any) -> Any:
    """Biases and norms are drawn trivially: make them matter."""
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return theirs.eval()


@pytest.mark.parametrize("make", [bert, megatron, roberta])
def test_logits_with_padding_and_types_are_those_of_transformers(make: Any) -> None:
    torch.manual_seed(1)
    theirs = random_norms(make())
    _, built = loaded(theirs)
    tokens = torch.randint(3, 100, (2, 24))
    real = torch.ones_like(tokens)
    real[1, 17:] = 0  # padding
    tokens[real == 0] = 1
    types = torch.zeros_like(tokens)
    if make is not roberta:
        types[:, 10:] = 1
    there = theirs(input_ids=tokens, attention_mask=real, token_type_ids=types)
    found = built(BERTInputs(tokens, types, (1 - real).int()))
    if make is not roberta:
        logits, sentences = found
        torch.testing.assert_close(sentences, there.seq_relationship_logits, rtol=1e-4, atol=1e-4)
        wanted = there.prediction_logits
    else:
        logits, wanted = found, there.logits
    mine = logits.transpose(0, 1)[..., :100]
    keep = real.bool()
    torch.testing.assert_close(mine[keep], wanted[keep], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [bert, megatron, roberta])
def test_weights_and_configuration_come_back(make: Any) -> None:
    theirs = make()
    model, built = loaded(theirs)
    assert family(model) == theirs.config.model_type
    back = weights_to_hugging_face(built.named_parameters(), model)
    there = theirs.state_dict()
    for name, tensor in back.items():
        first = 2 if make is roberta and "position_embeddings" in name else 0
        torch.testing.assert_close(tensor[first:], there[name][first:], rtol=0, atol=0)
    tied = {name for name in there if name.endswith(("decoder.weight", "decoder.bias", "position_ids"))}
    assert there.keys() - tied <= back.keys()
    facts = config_to_hugging_face(model)
    again = type(theirs.config)(**facts)
    for key in SIZES:
        assert getattr(again, key) == getattr(theirs.config, key), key


def test_a_padded_text_is_the_text_alone() -> None:
    torch.manual_seed(1)
    _, built = loaded(random_norms(bert()))
    tokens = torch.randint(3, 100, (1, 24))
    segments = torch.zeros(1, 24, dtype=torch.int32)
    segments[:, 15:] = 1
    with torch.no_grad():
        whole, _ = built(BERTInputs(tokens, None, segments))
        alone, _ = built(BERTInputs(tokens[:, :15]))
    torch.testing.assert_close(whole[:15], alone, rtol=1e-5, atol=1e-5)
