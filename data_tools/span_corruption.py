"""Spans replaced by sentinels in what the encoder sees, and asked for by the decoder, as pure functions on arrays.

Raffel et al. 2020 (arXiv:1910.10683), section 3.1.4, lengths as in google-research/text-to-text-transfer-transformer
(t5/data/preprocessors.py, random_spans_helper); UL2's denoisers: Tay et al. 2022, arXiv:2205.05131, table 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from data_tools.blended_dataset import BlendedDataset
from data_tools.draws import Draws
from data_tools.errors import DataError
from data_tools.objectives import SpanCorruption
from data_tools.special_tokens import NUM_SENTINELS, SpecialTokens

TEXT, PADDING = 0, 1  # segments
ONE_END = 1


class Denoiser(NamedTuple):
    """A way to corrupt; ``mode`` is the token that announces it, in a mixture."""

    mode: Literal["R", "S", "X"] | None
    mean_span: float
    noise_density: float

    def counts(self, length: int) -> tuple[int, int]:
        """Tokens that are asked for, of a text of ``length``, and spans that they lie in."""
        if self.mode == "S":
            return max(1, length // 2), 1  # at most
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        return noise, min(max(round(noise / self.mean_span), 1), noise, length - noise)

    def input_length(self, length: int) -> int:
        noise, spans = self.counts(length)
        if self.mode == "S":
            noise = 1  # at least
        return length - noise + spans + ONE_END + (self.mode is not None)

    def target_length(self, length: int) -> int:
        noise, spans = self.counts(length)
        return noise + spans + ONE_END


UL2 = (
    Denoiser("R", 3.0, 0.15),
    Denoiser("R", 8.0, 0.15),
    Denoiser("S", 0.0, 0.25),
    Denoiser("X", 3.0, 0.5),
    Denoiser("X", 8.0, 0.5),
    Denoiser("X", 64.0, 0.15),
    Denoiser("X", 64.0, 0.5),
)


def denoisers(facts: SpanCorruption) -> tuple[Denoiser, ...]:
    return UL2 if facts.mixture == "ul2" else (Denoiser(None, facts.mean_span, facts.noise_density),)


@dataclass(frozen=True)
class Lengths:
    """Of one sample: the text, what the encoder sees of it, and what the decoder says at most."""

    text: int
    inputs: int
    targets: int


def lengths(facts: SpanCorruption, sequence_length: int) -> Lengths:
    """The longest text that fits the encoder's sequence in every way of corrupting it."""
    ways = denoisers(facts)

    def fits(length: int) -> bool:
        return all(way.input_length(length) <= sequence_length for way in ways)

    text = 2
    if not fits(text):
        raise DataError(f"sequence_length={sequence_length}: too short for span_corruption; use a longer one")
    while fits(text + 1):
        text += 1
    spans = max(way.counts(text)[1] for way in ways)
    if spans > NUM_SENTINELS:
        raise DataError(
            f"sequence_length={sequence_length}: {spans} spans in {text} tokens, and {NUM_SENTINELS} sentinels; "
            "use a shorter sequence_length, a larger objective.mean_span, or a smaller noise_density"
        )
    needed = max(way.target_length(text) for way in ways)
    stated = facts.target_length
    if stated is not None and stated < needed:
        raise DataError(
            f"objective.target_length={stated}: the decoder says up to {needed} tokens of sequence_length="
            f"{sequence_length}; use {needed} or more, or leave it out"
        )
    return Lengths(text, sequence_length, stated or needed)


class Corrupted(NamedTuple):
    inputs: np.ndarray  # int64 [n], with the token that ends it
    targets: np.ndarray  # int64 [m], likewise


def corrupt(tokens: np.ndarray, way: Denoiser, draws: Draws, special: SpecialTokens, end: int) -> Corrupted:
    """int64 [n] -> what the encoder sees, and what the decoder says."""
    sentinels = np.array([special[f"sentinel-{i}"] for i in range(NUM_SENTINELS)], dtype=np.int64)
    front = [] if way.mode is None else [np.array([special[f"mode-{way.mode}"]])]
    if way.mode == "S":  # the end of the text, of any length around the mean
        most = way.counts(len(tokens))[0]
        cut = len(tokens) - draws.integer(1, most + 1)
        seen = np.concatenate([*front, tokens[:cut], sentinels[:1], [end]])
        return Corrupted(seen, np.concatenate([sentinels[:1], tokens[cut:], [end]]))
    noise, spans = way.counts(len(tokens))
    kept, lost = _parts(len(tokens) - noise, spans, draws), _parts(noise, spans, draws)
    pieces = np.split(tokens, np.cumsum(np.stack([kept, lost], axis=1).reshape(-1))[:-1])
    inputs = [part for i in range(spans) for part in (pieces[2 * i], sentinels[i : i + 1])]
    targets = [part for i in range(spans) for part in (sentinels[i : i + 1], pieces[2 * i + 1])]
    return Corrupted(np.concatenate([*front, *inputs, [end]]), np.concatenate([*targets, [end]]))


def _parts(total: int, count: int, draws: Draws) -> np.ndarray:
    """``count`` positive numbers that add up to ``total``, all such lists equally likely."""
    cuts = np.sort(draws.order(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


@dataclass(frozen=True)
class StackedBatch:
    """One micro-batch of two stacks."""

    tokens: np.ndarray  # int64 [b s], the encoder's
    targets: np.ndarray  # int64 [b t], the decoder's: labels, one later, after a token that begins them
    labels: np.ndarray  # int64 [b t]
    loss_mask: (
        np.ndarray
    )  # bool [b t]; a filler of an evaluation may be on one rank and not on another, so always there
    segments: np.ndarray | None  # int32 [b s], where there may be padding


class CorruptedBatches:
    """Makes the micro-batches of one set."""

    def __init__(self, facts: SpanCorruption, special: SpecialTokens, *, length: int, seed: int, end: int):
        self._ways, self._special, self._seed, self._end = denoisers(facts), special, seed, end
        self.lengths = lengths(facts, length)

    def batch(self, dataset: BlendedDataset, numbers: Sequence[int], counts: Sequence[bool]) -> StackedBatch:
        """``counts``: False for a filler, of which nothing is asked."""
        rows = [self.row(dataset.sample(number).tokens, number) for number in numbers]
        inputs, targets, padding = self.lengths.inputs, self.lengths.targets, self._special["padding"]
        labels = np.stack([_padded(row.targets, targets, padding) for row in rows])
        real = np.stack([np.arange(targets) < len(row.targets) for row in rows]) & np.array(counts)[:, None]
        seen = np.stack([np.arange(inputs) >= len(row.inputs) for row in rows])
        begin = np.full((len(rows), 1), padding, dtype=np.int64)
        return StackedBatch(
            tokens=np.stack([_padded(row.inputs, inputs, padding) for row in rows]),
            targets=np.concatenate([begin, labels[:, :-1]], axis=1),
            labels=labels,
            loss_mask=real,
            segments=np.where(seen, PADDING, TEXT).astype(np.int32) if self._may_pad else None,
        )

    def row(self, tokens: np.ndarray, number: int) -> Corrupted:
        draws = Draws("spans", self._seed, number)
        way = self._ways[draws.integer(0, len(self._ways))]
        return corrupt(tokens[: self.lengths.text], way, draws, self._special, self._end)

    @property
    def _may_pad(self) -> bool:
        """One way of corrupting always gives the same lengths, but they may not fill the sequences."""
        way, length = self._ways[0], self.lengths.text
        exact = (
            way.input_length(length) == self.lengths.inputs
            and way.target_length(length) == self.lengths.targets
        )
        return len(self._ways) > 1 or not exact


def _padded(row: np.ndarray, length: int, padding: int) -> np.ndarray:
    return np.pad(row, (0, length - len(row)), constant_values=padding)
