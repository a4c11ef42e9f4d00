"""Inputs and targets hold the whole text between them, at lengths that are known beforehand."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_tools.config import DataConfig
from data_tools.draws import Draws
from data_tools.errors import DataError
from data_tools.loader import StepShape
from data_tools.objectives import SpanCorruption
from data_tools.span_corruption import UL2, Denoiser, StackedBatch, corrupt, lengths
from data_tools.special_tokens import SpecialTokens, special_tokens
from data_tools.tokenizer import load_tokenizer
from data_tools.training_data import open_data

FACTS = SpanCorruption(mixture="ul2")
SPECIAL = special_tokens(load_tokenizer("bytes"), FACTS)
END = 256


def put_together(inputs: np.ndarray, targets: np.ndarray, special: SpecialTokens) -> list[int]:
    """The text again: each sentinel of the inputs stands for what follows it in the targets."""
    sentinels = {special[f"sentinel-{i}"] for i in range(100)}
    answers: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if int(token) in sentinels:
            answers[int(token)] = current = []
        else:
            current.append(int(token))
    modes = {special.ids.get(f"mode-{mode}") for mode in "RSX"}
    text: list[int] = []
    for token in inputs[:-1]:
        if int(token) not in modes:
            text += answers.pop(int(token)) if int(token) in sentinels else [int(token)]
    assert not answers, "every sentinel of the targets is asked for"
    return text


@settings(deadline=None, max_examples=150)
@given(
    way=st.sampled_from([Denoiser(None, 3.0, 0.15), *UL2]),
    length=st.integers(4, 400),
    seed=st.integers(0, 10**6),
)
def test_nothing_is_lost_and_lengths_are_as_planned(way: Denoiser, length: int, seed: int) -> None:
    if way.counts(length)[1] > 100:
        return
    tokens = np.arange(length) % 250
    found = corrupt(tokens, way, Draws(seed), SPECIAL, END)
    assert put_together(found.inputs, found.targets, SPECIAL) == tokens.tolist()
    assert found.inputs[-1] == found.targets[-1] == END
    if way.mode == "S":
        assert len(found.inputs) <= way.input_length(length) and len(found.targets) <= way.target_length(
            length
        )
    else:
        assert (len(found.inputs), len(found.targets)) == (
            way.input_length(length),
            way.target_length(length),
        )


def test_t5s_own_lengths() -> None:
    """512 tokens in, 114 out, of a text of 568: t5.data.preprocessors' example for 15% in spans of 3."""
    found = lengths(SpanCorruption(), 512)
    assert (found.text, found.targets) == (568, 114)


def test_spans_have_the_mean_length() -> None:
    tokens = np.arange(568) % 250
    found = corrupt(tokens, Denoiser(None, 3.0, 0.15), Draws(1), SPECIAL, END)
    spans = sum(1 for token in found.targets if int(token) in {SPECIAL[f"sentinel-{i}"] for i in range(100)})
    assert spans == 28 and len(found.targets) - 1 - spans == 85


@pytest.mark.parametrize("objective", [{}, {"mixture": "ul2"}, {"target_length": 30}])
def test_batches_are_the_same_on_any_rank(corpus: str, objective: dict[str, Any]) -> None:
    config = DataConfig(
        train=corpus,  # type: ignore[arg-type]
        split="90,10,0",
        sequence_length=32,
        objective={"kind": "span_corruption", **objective},  # type: ignore[arg-type]
    )
    data = open_data(config, num_train_samples=100)
    assert data.vocab_size > 257 + 100
    alone = next(data.train.loader(StepShape(4)))[0]
    assert isinstance(alone, StackedBatch)
    assert alone.tokens.shape == (4, 32) and alone.targets.shape == alone.labels.shape
    for rank in range(2):
        half = next(data.train.loader(StepShape(2, 1, rank, 2)))[0]
        assert isinstance(half, StackedBatch)
        assert np.array_equal(half.tokens, alone.tokens[2 * rank : 2 * rank + 2])
        assert np.array_equal(half.labels, alone.labels[2 * rank : 2 * rank + 2])
    assert np.array_equal(alone.targets[:, 1:], alone.labels[:, :-1])


@pytest.mark.parametrize(
    ("facts", "length", "message"),
    [
        ({}, 2, "sequence_length=2: too short for span_corruption; use a longer one"),
        ({"target_length": 5}, 64, "objective.target_length=5: the decoder says up to .* tokens"),
        (
            {"mean_span": 1.0, "noise_density": 0.5},
            512,
            "spans in .* tokens, and 100 sentinels; use a shorter",
        ),
    ],
)
def test_what_does_not_fit_says_so(facts: dict[str, Any], length: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        lengths(SpanCorruption(**facts), length)
    with pytest.raises(ValidationError, match=message):
        DataConfig(
            train="x",  # type: ignore[arg-type]
            sequence_length=length,
            objective={"kind": "span_corruption", **facts},  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"kind": "span_corruption", "mixture": "ul2", "mean_span": 9}, r"mean_span=9\.0 with mixture=ul2"),
        ({"kind": "mlm", "span_p": 0.5}, r"span_p=0\.5 with unit=token: has no effect"),
        ({"kind": "mlm", "short_share": 0.5}, r"short_share=0\.5 with second_task=none"),
    ],
)
def test_a_value_that_would_do_nothing_is_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(train="x", sequence_length=64, objective=facts)  # type: ignore[arg-type]
