"""Sampling from logits, and how far a model can speak."""

import pytest
import torch

from data_tools.tokenizer import load_tokenizer
from model_providers.config import ModelConfig
from pretrain.errors import RunError
from pretrain.generate import Generator, Sampling, choose

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def drawn(sampling: Sampling, times: int = 400) -> set[int]:
    random = torch.Generator().manual_seed(0)
    return {choose(LOGITS.clone(), sampling, random) for _ in range(times)}


def test_greedy_takes_the_likeliest() -> None:
    assert drawn(Sampling(temperature=0), 3) == {0}


def test_all_tokens_are_possible_without_limits() -> None:
    assert drawn(Sampling(temperature=1.0)) == {0, 1, 2, 3}


def test_top_k_keeps_k_tokens() -> None:
    assert drawn(Sampling(temperature=1.0, top_k=2)) == {0, 1}
    assert drawn(Sampling(temperature=1.0, top_k=9)) == {0, 1, 2, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    """Probabilities are 0.64, 0.24, 0.09, 0.03."""
    assert drawn(Sampling(temperature=1.0, top_p=0.5)) == {0}
    assert drawn(Sampling(temperature=1.0, top_p=0.7)) == {0, 1}
    assert drawn(Sampling(temperature=1.0, top_p=0.9)) == {0, 1, 2}


def test_probabilities_are_those_of_the_softmax() -> None:
    random = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[choose(LOGITS.clone(), Sampling(temperature=0.5), random)] += 1
    assert torch.allclose(counts / 4000, (LOGITS / 0.5).softmax(-1), atol=0.02)


def test_learned_positions_end_somewhere() -> None:
    """Rotary positions go on beyond what was trained; a table of positions does not."""
    model = ModelConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        vocab_size=257,
        position_embedding="learned",
        max_sequence_length=16,
    )
    speaker = Generator([], model, load_tokenizer("bytes"), torch.device("cpu"))
    with pytest.raises(
        RunError, match=r"18 tokens together, .*model\.max_sequence_length=16; shorten either"
    ):
        speaker.continue_text("12345678", num_tokens=10, sampling=Sampling())
