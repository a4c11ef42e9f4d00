"""From samples to micro-batches of masked text, with a second text where there is a second task.

    [CLS] text [SEP]                       one task: the text fills the sequence
    [CLS] first [SEP] second [SEP] ...     two: what is left is padding

Everything that is drawn belongs to the sample's number: the same sample has the same mask on every rank and after
every restart, and another one in its next epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.blended_dataset import BlendedDataset
from data_tools.draws import Draws
from data_tools.masking import mask
from data_tools.objectives import MaskedLM
from data_tools.special_tokens import SpecialTokens
from data_tools.words import WordTable

NUM_SPECIAL = {"none": 2, "next_sentence": 3, "sentence_order": 3}
FIRST, SECOND = 0, 1  # token types
TEXT, PADDING = 0, 1  # segments: attention stays inside one
SMALLEST = 2  # tokens of one of two texts


@dataclass(frozen=True)
class MaskedBatch:
    """One micro-batch."""

    tokens: np.ndarray  # int64 [b s]
    labels: np.ndarray  # int64 [b s], what stood there
    loss_mask: np.ndarray  # bool [b s], what is asked for
    types: np.ndarray | None = None  # int64 [b s]
    segments: np.ndarray | None = None  # int32 [b s], where there may be padding
    sentence_labels: np.ndarray | None = None  # int64 [b]: 1, the second does not follow the first
    counts: np.ndarray | None = None  # bool [b], False: fills up an evaluation's last step
    replaced: bool = False  # the model is to tell guesses from what stood there


@dataclass(frozen=True)
class _Row:
    tokens: np.ndarray
    labels: np.ndarray
    asked: np.ndarray
    types: np.ndarray
    segments: np.ndarray
    sentence_label: int


class MaskedBatches:
    """Makes the micro-batches of one set."""

    def __init__(self, facts: MaskedLM, special: SpecialTokens, words: WordTable, *, length: int, seed: int):
        self._facts, self._special, self._words = facts, special, words
        self._length, self._seed = length, seed

    @property
    def text_length(self) -> int:
        """Tokens of text in a sample at most."""
        return self._length - NUM_SPECIAL[self._facts.second_task]

    def batch(self, dataset: BlendedDataset, numbers: Sequence[int], counts: Sequence[bool]) -> MaskedBatch:
        """``counts``: False for a filler, of which nothing is asked."""
        rows = [self.row(dataset, number) for number in numbers]
        asked = np.stack([row.asked for row in rows]) & np.array(counts)[:, None]
        pairs = self._facts.second_task != "none"
        return MaskedBatch(
            tokens=np.stack([row.tokens for row in rows]),
            labels=np.stack([row.labels for row in rows]),
            loss_mask=asked,
            types=np.stack([row.types for row in rows]) if pairs else None,
            segments=np.stack([row.segments for row in rows]) if pairs else None,
            sentence_labels=np.array([row.sentence_label for row in rows], dtype=np.int64) if pairs else None,
            counts=np.array(counts) if pairs or self._facts.replaced else None,
            replaced=self._facts.replaced,
        )

    def row(self, dataset: BlendedDataset, number: int) -> _Row:
        draws = Draws("mlm", self._seed, number)
        text = dataset.sample(number).tokens[: self.text_length]
        if self._facts.second_task == "none":
            return self._assembled([text], 0, draws)
        if draws.chance(self._facts.short_share):
            text = text[: draws.integer(min(len(text), 2 * SMALLEST), len(text) + 1)]
        first, second = self._cut(text, draws)
        swapped = draws.chance(0.5)
        if self._facts.second_task == "sentence_order":
            parts = [second, first] if swapped else [first, second]
            return self._assembled(parts, int(swapped), draws)
        if swapped:
            second = self._another(dataset, number, draws)[: max(SMALLEST, len(second))]
        return self._assembled([first, second], int(swapped), draws)

    def _cut(self, text: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """At the end of a sentence, any of them; in a text of one sentence, between any two tokens."""
        ends = self._words.sentence_ends(text)
        ends = ends[(ends >= SMALLEST) & (ends <= len(text) - SMALLEST)]
        if len(ends):
            cut = int(ends[draws.integer(0, len(ends))])
        else:
            cut = draws.integer(min(SMALLEST, len(text) - 1), max(SMALLEST, len(text) - SMALLEST) + 1)
        return text[:cut], text[cut:]

    def _another(self, dataset: BlendedDataset, number: int, draws: Draws) -> np.ndarray:
        """The text of any other sample of the same corpus."""
        source, within = dataset.source_of(number)
        others = source.samples_per_epoch
        return source.sample((within + draws.integer(1, max(2, others))) % others).tokens

    def _assembled(self, parts: list[np.ndarray], label: int, draws: Draws) -> _Row:
        begin, separator = self._special["begin"], self._special["separator"]
        pieces, may, types = [np.array([begin])], [np.zeros(1, dtype=np.bool_)], [np.zeros(1, dtype=np.int64)]
        for number, part in enumerate(parts):
            pieces += [part, np.array([separator])]
            may += [np.ones(len(part), dtype=np.bool_), np.zeros(1, dtype=np.bool_)]
            types.append(np.full(len(part) + 1, FIRST if number == 0 else SECOND, dtype=np.int64))
        labels, allowed = np.concatenate(pieces).astype(np.int64), np.concatenate(may)
        text = np.where(labels < self._special.text_size, labels, 0)
        masked = mask(
            labels,
            self._words.words(text),
            allowed,
            draws,
            self._facts,
            mask_id=self._special["mask"],
            text_size=self._special.text_size,
        )
        missing = self._length - len(labels)
        segments = np.full(self._length, PADDING, dtype=np.int32)
        segments[: len(labels)] = TEXT
        return _Row(
            tokens=np.pad(masked.tokens, (0, missing), constant_values=self._special["padding"]),
            labels=np.pad(labels, (0, missing), constant_values=self._special["padding"]),
            asked=np.pad(masked.asked, (0, missing)),
            types=np.pad(np.concatenate(types), (0, missing)),
            segments=segments,
            sentence_label=label,
        )
