"""Samples as an objective makes them, for the eye: what the model sees, and what it must say."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from pydantic import ValidationError

from data_tools.config import DataConfig
from data_tools.errors import DataError
from data_tools.loader import GPTBatch
from data_tools.masked_batches import MaskedBatch
from data_tools.rearranged import PrefixBatch
from data_tools.special_tokens import NAMES, SpecialTokens, special_tokens
from data_tools.tokenizer import Tokenizer
from data_tools.training_data import TrainingData, open_data

KINDS = {
    "mlm": {"kind": "mlm"},
    "nsp": {"kind": "mlm", "unit": "word", "second_task": "next_sentence"},
    "sop": {"kind": "mlm", "unit": "word", "second_task": "sentence_order"},
    "span": {"kind": "mlm", "unit": "span"},
    "t5": {"kind": "span_corruption"},
    "ul2": {"kind": "span_corruption", "mixture": "ul2"},
    "fim": {"kind": "fim"},
    "prefix_lm": {"kind": "prefix_lm"},
}


def samples(prefix: str, name: str, *, count: int, length: int, tokenizer: str | None) -> Iterator[str]:
    """Lines on the first ``count`` samples of a corpus under an objective of `KINDS`."""
    if name not in KINDS:
        raise DataError(f"--objective={name}: unknown; there are {', '.join(KINDS)}")
    if count < 1:
        raise DataError(f"--first={count}: give 1 or more samples to show")
    try:
        config = DataConfig(
            train=prefix,  # type: ignore[arg-type]
            split="100,0,0",
            sequence_length=length,
            objective=KINDS[name],  # type: ignore[arg-type]
            tokenizer=tokenizer,
        )
    except ValidationError as fault:
        told = fault.errors()[0]["msg"].removeprefix("Value error, ")
        raise DataError(f"--objective={name} --sequence-length={length}: {told}") from None
    data = open_data(config)
    batch = data.train.batch(list(range(count)))
    write = _Writer(data)
    for number in range(count):
        yield f"sample {number}"
        if isinstance(batch, MaskedBatch):
            yield from _masked(batch, number, write)
        elif isinstance(batch, GPTBatch | PrefixBatch):
            yield f"  sees  {write(batch.tokens[number])}"
            if batch.loss_mask is not None:
                yield f"  says  {write(batch.labels[number][batch.loss_mask[number]])}"
        else:
            yield f"  sees  {write(_without(batch.tokens[number], write.padding))}"
            yield f"  says  {write(_without(batch.labels[number], write.padding))}"


def _masked(batch: MaskedBatch, number: int, write: "_Writer") -> Iterator[str]:
    tokens, labels, asked = batch.tokens[number], batch.labels[number], batch.loss_mask[number]
    yield f"  sees  {write(_without(tokens, write.padding))}"
    for seen, token in zip(tokens[asked], labels[asked], strict=True):
        yield f"  says  {write([token])!r} for {write([seen])!r}"
    if batch.sentence_labels is not None:
        yield f"  and   the second text {'does not follow' if batch.sentence_labels[number] else 'follows'}"


class _Writer:
    """Ids to text, special tokens by their names."""

    def __init__(self, data: TrainingData):
        self._tokenizer: Tokenizer = data.tokenizer
        self._special: SpecialTokens = special_tokens(data.tokenizer, data.config.objective)
        self._names = {number: NAMES[role][0] for role, number in self._special.ids.items()}
        self.padding = self._special.ids.get("padding", -1)

    def __call__(self, ids: Sequence[int] | np.ndarray) -> str:
        parts = []
        for is_special, run in groupby((int(token) for token in ids), self._names.__contains__):
            found = list(run)
            parts.append(
                "".join(self._names[token] for token in found)
                if is_special
                else self._tokenizer.decode(found)
            )
        return "".join(parts)


def _without(ids: np.ndarray, padding: int) -> np.ndarray:
    return ids[ids != padding]
