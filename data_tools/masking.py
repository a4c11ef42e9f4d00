"""Masked tokens as pure functions on arrays: the same draws and the same tokens give the same sample."""

from typing import NamedTuple

import numpy as np

from data_tools.draws import Draws
from data_tools.objectives import MaskedLM


class Masked(NamedTuple):
    tokens: np.ndarray  # int64 [n], what the model sees
    asked: np.ndarray  # bool [n], what it must say


def mask(
    tokens: np.ndarray,  # int64 [n]
    words: np.ndarray,  # int64 [n], the number of each token's word
    may: np.ndarray,  # bool [n], False for special tokens
    draws: Draws,
    facts: MaskedLM,
    *,
    mask_id: int,
    text_size: int,  # random tokens come from below
) -> Masked:
    """80/10/10 of 15%, by default (Devlin et al. 2019, section 3.1)."""
    budget = max(1, round(facts.share * int(may.sum())))
    asked = {"token": _tokens, "word": _words, "span": _spans}[facts.unit](words, may, budget, draws, facts)
    places = np.flatnonzero(asked)
    seen = tokens.copy()
    fate = draws.uniform(len(places))
    if facts.unit == "span":  # a span has one fate (Joshi et al. 2020, section 3.1)
        runs = np.cumsum(np.diff(places, prepend=-2) != 1) - 1
        fate = fate[runs]
    anything = draws.integers(text_size, len(places))
    to_mask = fate < facts.mask_share
    to_random = ~to_mask & (fate < facts.mask_share + facts.random_share)
    seen[places[to_mask]] = mask_id
    seen[places[to_random]] = anything[to_random]
    return Masked(seen, asked)


def _tokens(words: np.ndarray, may: np.ndarray, budget: int, draws: Draws, facts: MaskedLM) -> np.ndarray:
    places = np.flatnonzero(may)
    return _marked(len(may), places[draws.order(len(places))[:budget]])


def _words(words: np.ndarray, may: np.ndarray, budget: int, draws: Draws, facts: MaskedLM) -> np.ndarray:
    """Whole words in any order; one that exceeds what is left is passed over."""
    groups = _places_of_words(words, may)
    taken: list[np.ndarray] = []
    left = budget
    order = draws.order(len(groups))
    for number in order:
        if len(groups[number]) <= left:
            taken.append(groups[number])
            left -= len(groups[number])
        if not left:
            break
    return _marked(len(may), _joined(taken or [groups[number] for number in order[:1]]))


def _spans(words: np.ndarray, may: np.ndarray, budget: int, draws: Draws, facts: MaskedLM) -> np.ndarray:
    """Runs of whole words of geometric length until the budget is reached (Joshi et al. 2020, arXiv:1907.10529)."""
    groups = _places_of_words(words, may)
    asked = np.zeros(len(may), dtype=np.bool_)
    left = budget
    for start in draws.order(len(groups)):
        length = draws.geometric(facts.span_p, facts.span_max)
        for group in groups[start : start + length]:
            fresh = group[~asked[group]]
            if len(fresh) < len(group) or len(group) > left or not _follows(asked, group, groups[start]):
                break
            asked[group] = True
            left -= len(group)
        if left <= 0:
            break
    return asked


def _follows(asked: np.ndarray, group: np.ndarray, first: np.ndarray) -> bool:
    """Whether it is the run's first word or comes right after one that is asked for already."""
    return group[0] == first[0] or bool(asked[group[0] - 1])


def _places_of_words(words: np.ndarray, may: np.ndarray) -> list[np.ndarray]:
    places = np.flatnonzero(may)
    if not len(places):
        return []
    cuts = np.flatnonzero((np.diff(words[places]) != 0) | (np.diff(places) != 1)) + 1
    return np.split(places, cuts)


def _joined(groups: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(groups) if groups else np.empty(0, dtype=np.int64)


def _marked(length: int, places: np.ndarray) -> np.ndarray:
    marked = np.zeros(length, dtype=np.bool_)
    marked[places] = True
    return marked
