"""Middles come last without a token lost, and prefixes are seen and not asked for."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.config import DataConfig
from data_tools.gpt_dataset import Sample
from data_tools.loader import GPTBatch, StepShape
from data_tools.objectives import FillInTheMiddle
from data_tools.rearranged import MiddleLast, PrefixBatch
from data_tools.special_tokens import special_tokens
from data_tools.tokenizer import load_tokenizer
from data_tools.training_data import open_data

END = 256
TOKENIZER = load_tokenizer("bytes")


def in_order(piece: list[int], special: Any) -> list[int]:
    """A rearranged piece's text as it was."""
    prefix, suffix, middle = (special[role] for role in ("prefix", "suffix", "middle"))
    last = piece[-1:] if piece[-1] == END else []
    piece = piece[: len(piece) - len(last)]
    if piece[1] == suffix:
        cut = piece.index(middle)
        return piece[cut + 1 :], piece[2:cut], last  # type: ignore[return-value]
    first, second = piece.index(suffix), piece.index(middle)
    assert piece[0] == prefix
    return piece[1:first] + piece[second + 1 :], piece[first + 1 : second], last  # type: ignore[return-value]


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    spm=st.sampled_from([0.0, 0.5, 1.0]),
    number=st.integers(0, 10**6),
)
def test_documents_keep_their_places_and_their_text(
    lengths: list[int], share: float, spm: float, number: int
) -> None:
    tokens = np.concatenate([np.append(np.arange(n) % 250, END) for n in lengths])
    starts = np.concatenate([[0], np.cumsum([n + 1 for n in lengths])[:-1]])
    facts = FillInTheMiddle(share=share, spm_share=spm)
    special = special_tokens(TOKENIZER, facts)
    sample = Sample(tokens, starts)
    found = MiddleLast(facts, special, seed=1, end=END)(sample, number)
    assert len(found.tokens) == len(tokens) and np.array_equal(found.starts, starts)
    marked = 0
    for before, after in zip(np.split(tokens, starts[1:]), np.split(found.tokens, starts[1:]), strict=True):
        if special["prefix"] not in after:
            assert np.array_equal(before, after)
            continue
        marked += 1
        text, suffix, last = in_order(after.tolist(), special)
        assert text + suffix == before.tolist()[: len(before) - 4] and last == [END]  # type: ignore[operator]
    worth_it = sum(n + 1 >= 8 for n in lengths)
    if share in (0.0, 1.0):
        assert marked == share * worth_it


def opened(corpus: str, kind: str, **more: Any) -> Any:
    config = DataConfig(train=corpus, split="90,10,0", sequence_length=48, objective=kind, **more)  # type: ignore[arg-type]
    return open_data(config, num_train_samples=100)


@pytest.mark.parametrize("kind", ["fim", "prefix_lm"])
def test_a_sample_is_the_same_on_any_rank(corpus: str, kind: str) -> None:
    train = opened(corpus, kind).train
    alone = next(train.loader(StepShape(4)))[0]
    for rank in range(2):
        half = next(train.loader(StepShape(2, 1, rank, 2)))[0]
        assert np.array_equal(half.tokens, alone.tokens[2 * rank : 2 * rank + 2])
        assert np.array_equal(half.labels, alone.labels[2 * rank : 2 * rank + 2])


def test_marked_documents_go_with_attention_inside_documents(corpus: str) -> None:
    data = opened(corpus, "fim", documents="reset")
    assert data.vocab_size == 257 + 3
    batch = data.train.batch(list(range(20)))
    assert isinstance(batch, GPTBatch) and batch.segments is not None
    assert (batch.tokens >= 257).any() and batch.labels.max() < 260


def test_only_what_follows_the_prefix_is_asked_for(corpus: str) -> None:
    batch = opened(corpus, "prefix_lm").train.batch(list(range(50)))
    assert isinstance(batch, PrefixBatch)
    lengths = (batch.segments == 0).sum(axis=1)
    assert lengths.min() >= 1 and lengths.max() <= 47 and len(set(lengths.tolist())) > 20
    for row, length in enumerate(lengths):
        assert not batch.loss_mask[row][: length - 1].any() and batch.loss_mask[row][length - 1 :].all()
