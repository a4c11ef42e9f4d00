"""Objectives of a decoder beside the next token: documents with their middle last, and texts with a prefix.

Fill-in-the-middle at the level of the context, as Bavarian et al. 2022 (arXiv:2207.14255), sections 3 and 4.3: what a
sample holds of a document is cut in three, and keeps its length, so that its last tokens make room for three marks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.blended_dataset import BlendedDataset
from data_tools.draws import Draws
from data_tools.gpt_dataset import Sample
from data_tools.objectives import FillInTheMiddle
from data_tools.special_tokens import SpecialTokens

NUM_MARKS = 3
SHORTEST = 8  # tokens of a piece that is worth it
PREFIX, REST = 0, 1  # segments of a text with a prefix


class MiddleLast:
    """Rearranges the documents of a sample; the same sample always alike."""

    def __init__(self, facts: FillInTheMiddle, special: SpecialTokens, *, seed: int, end: int):
        self._facts, self._special, self._seed, self._end = facts, special, seed, end

    def __call__(self, sample: Sample, number: int) -> Sample:
        draws = Draws("fim", self._seed, number)
        cuts = sample.starts[(sample.starts > 0) & (sample.starts < len(sample.tokens))]
        pieces = [self._piece(piece, draws) for piece in np.split(sample.tokens, cuts)]
        return Sample(np.concatenate(pieces), sample.starts)

    def _piece(self, piece: np.ndarray, draws: Draws) -> np.ndarray:
        if len(piece) < SHORTEST or not draws.chance(self._facts.share):
            return piece
        last = piece[-1:] if piece[-1] == self._end else piece[:0]
        text = piece[: len(piece) - len(last) - NUM_MARKS]
        first, second = sorted(draws.integer(0, len(text) + 1) for _ in range(2))
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        before, after, between = (np.array([self._special[role]]) for role in ("prefix", "suffix", "middle"))
        if draws.chance(self._facts.spm_share):
            return np.concatenate([before, after, suffix, between, prefix, middle, last])
        return np.concatenate([before, prefix, after, suffix, between, middle, last])


@dataclass(frozen=True)
class PrefixBatch:
    """One micro-batch of texts whose beginnings are seen both ways."""

    tokens: np.ndarray  # int64 [b s]
    labels: np.ndarray  # int64 [b s], the token after each
    segments: np.ndarray  # int32 [b s]: PREFIX, then REST
    loss_mask: np.ndarray  # bool [b s]: only what comes after the prefix is asked for


class PrefixBatches:
    """Makes the micro-batches of one set; prefixes have any length (Raffel et al. 2020, section 3.2.3)."""

    def __init__(self, *, length: int, seed: int):
        self._length, self._seed = length, seed

    def batch(self, dataset: BlendedDataset, numbers: Sequence[int], counts: Sequence[bool]) -> PrefixBatch:
        """``counts``: False for a filler, of which nothing is asked."""
        tokens = np.stack([dataset.sample(number).tokens for number in numbers])  # [b s+1]
        cuts = [Draws("prefix", self._seed, number).integer(1, self._length) for number in numbers]
        places = np.arange(self._length)[None]
        ends = np.array(cuts)[:, None]
        return PrefixBatch(
            tokens=np.ascontiguousarray(tokens[:, :-1]),
            labels=np.ascontiguousarray(tokens[:, 1:]),
            segments=np.where(places < ends, PREFIX, REST).astype(np.int32),
            loss_mask=(places >= ends - 1) & np.array(counts)[:, None],
        )
