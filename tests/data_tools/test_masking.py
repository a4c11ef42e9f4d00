"""What is masked: how much, which units, with which fate; and always the same for a sample."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.config import DataConfig
from data_tools.draws import Draws
from data_tools.loader import SampleSource, StepShape
from data_tools.masked_batches import MaskedBatch
from data_tools.masking import mask
from data_tools.objectives import MaskedLM
from data_tools.training_data import TrainingData, open_data

MASK, TEXT = 999, 900


def masked(facts: MaskedLM, *, seed: int = 0, length: int = 200, per_word: int = 2) -> Any:
    tokens = np.arange(length) % TEXT
    may = np.ones(length, dtype=np.bool_)
    may[[0, -1]] = False
    words = np.arange(length) // per_word
    return tokens, words, may, mask(tokens, words, may, Draws(seed), facts, mask_id=MASK, text_size=TEXT)


@settings(deadline=None, max_examples=60)
@given(
    unit=st.sampled_from(["token", "word", "span"]),
    share=st.floats(0.02, 0.6),
    length=st.integers(10, 300),
    per_word=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_as_much_is_asked_as_was_said_and_nothing_special(
    unit: Any, share: float, length: int, per_word: int, seed: int
) -> None:
    tokens, words, may, found = masked(
        MaskedLM(share=share, unit=unit), seed=seed, length=length, per_word=per_word
    )
    budget = max(1, round(share * (length - 2)))
    asked = found.asked.sum()
    assert not found.asked[~may].any()
    assert np.array_equal(found.tokens[~found.asked], tokens[~found.asked])
    if unit == "token":
        assert asked == budget
    else:  # whole words only, so a word may not fit any more; but never is more than a word missing
        assert asked <= max(budget, per_word)
        if unit != "span":  # a span may find no place that is left
            assert asked >= max(1, budget - per_word + 1)
        for word in np.unique(words[found.asked]):
            of_word = (words == word) & may
            assert found.asked[of_word].all(), "a word is asked for as a whole"


def test_fates_are_80_10_10() -> None:
    fates: Counter[str] = Counter()
    for seed in range(200):
        tokens, _, _, found = masked(MaskedLM(), seed=seed)
        seen, said = found.tokens[found.asked], tokens[found.asked]
        fates["mask"] += int((seen == MASK).sum())
        fates["same"] += int((seen == said).sum())
        fates["other"] += int(((seen != MASK) & (seen != said)).sum())
    total = sum(fates.values())
    assert fates["mask"] / total == pytest.approx(0.8, abs=0.02)
    assert fates["same"] / total == pytest.approx(0.1, abs=0.015)


def test_spans_are_runs_of_words_with_one_fate() -> None:
    lengths: list[int] = []
    for seed in range(100):
        tokens, _, _, found = masked(MaskedLM(unit="span"), seed=seed, length=400, per_word=1)
        places = np.flatnonzero(found.asked)
        for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
            lengths.append(len(run))
            seen = found.tokens[run]
            assert (seen == MASK).all() or np.array_equal(seen, tokens[run]) or (seen != MASK).all()
    assert 2.5 < np.mean(lengths) < 5.0, "3.8 on average in the paper, some runs touch or are cut"
    assert max(lengths) > 6


def test_geometric_lengths_have_the_papers_mean() -> None:
    draws = Draws("lengths")
    lengths = [draws.geometric(0.2, 10) for _ in range(4000)]
    assert np.mean(lengths) == pytest.approx(3.8, abs=0.15) and max(lengths) == 10 and min(lengths) == 1


def opened(corpus: str, **objective: Any) -> TrainingData:
    config = DataConfig(
        train=corpus, split="90,10,0", sequence_length=48, objective={"kind": "mlm", **objective}
    )  # type: ignore[arg-type]
    return open_data(config, num_train_samples=400)


def rows(source: SampleSource, shape: StepShape, steps: int) -> dict[int, tuple[np.ndarray, ...]]:
    """By sample number: tokens, labels, mask."""
    loader = source.loader(shape)
    found: dict[int, tuple[np.ndarray, ...]] = {}
    for step in range(steps):
        for batch, numbers in zip(next(loader), shape.numbers(step * shape.samples_per_step), strict=True):
            assert isinstance(batch, MaskedBatch)
            for row, number in enumerate(numbers):
                found[number] = (batch.tokens[row], batch.labels[row], batch.loss_mask[row])
    loader.close()
    return found


@pytest.mark.parametrize("second_task", ["none", "next_sentence", "sentence_order"])
def test_a_sample_is_the_same_on_any_rank_and_other_in_its_next_epoch(corpus: str, second_task: str) -> None:
    train = opened(corpus, second_task=second_task).train
    alone = rows(train, StepShape(8), 2)
    shared: dict[int, tuple[np.ndarray, ...]] = {}
    for rank in range(2):
        shared |= rows(train, StepShape(2, 2, rank, 2), 2)
    assert alone.keys() == shared.keys()
    for number in alone:
        for one, other in zip(alone[number], shared[number], strict=True):
            assert np.array_equal(one, other)
    epoch = train.dataset.datasets[0].samples_per_epoch
    first = train.batch(list(range(epoch)))
    again = train.batch([epoch + number for number in range(epoch)])
    assert isinstance(first, MaskedBatch) and isinstance(again, MaskedBatch)
    texts = {row.tobytes() for row in first.labels}
    if second_task == "none":
        assert len(texts & {row.tobytes() for row in again.labels}) < epoch
    assert not np.array_equal(first.loss_mask, again.loss_mask)


def test_second_texts_follow_or_do_not(corpus: str) -> None:
    data = opened(corpus, second_task="next_sentence", short_share=0.0)
    batch = data.train.batch(list(range(300)))
    assert isinstance(batch, MaskedBatch) and batch.sentence_labels is not None and batch.types is not None
    assert 0.4 < batch.sentence_labels.mean() < 0.6
    text = [data.tokenizer.decode(row) for row in batch.labels]
    source = Path(f"{corpus}.jsonl").read_text("utf-8")
    for row, label in enumerate(batch.sentence_labels):
        real = batch.segments[row] == 0  # type: ignore[index]
        assert batch.types[row][real].max() == 1 and not batch.loss_mask[row][~real].any()
        if not label:
            assert text[row] in source, "both texts side by side stand so in the corpus"


def test_swapped_texts_are_swapped(corpus: str) -> None:
    data = opened(corpus, second_task="sentence_order", short_share=0.0)
    batch = data.train.batch(list(range(100)))
    assert isinstance(batch, MaskedBatch) and batch.sentence_labels is not None and batch.types is not None
    source = Path(f"{corpus}.jsonl").read_text("utf-8")
    for row, label in enumerate(batch.sentence_labels):
        text = batch.labels[row] < 256
        parts = [
            data.tokenizer.decode(batch.labels[row][text & (batch.types[row] == kind)]) for kind in (0, 1)
        ]
        joined = "".join(parts[::-1] if label else parts)
        assert joined in source


def test_random_numbers_never_change() -> None:
    """Written down once: a new version of a library must not change what a resumed run sees."""
    assert Draws("a").integers(1000, 4).tolist() == [442, 124, 838, 832]
    assert Draws("mlm", 1234, 5).uniform(2).tolist() == [0.7519460346057897, 0.4122099026634688]
