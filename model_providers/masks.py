"""Who may see whom: packed documents, windows, and queries that come after a cache."""

from functools import lru_cache

import torch


def positions(tokens: torch.Tensor, segments: torch.Tensor | None, start: int = 0) -> torch.Tensor:
    """Each token's place in its own document: int64 [1 s] without segments, [b s] with."""
    place = torch.arange(start, start + tokens.size(1), device=tokens.device)[None]  # [1 s]
    if segments is None:
        return place
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return place - torch.where(begins, place, 0).cummax(dim=1).values


class MaskMaker:
    """The mask of the segments at hand, made once and shared by all layers of a rank.

    ``has_prefix``: segments are 0 in a text's prefix, which is seen both ways, and 1 after it.
    """

    def __init__(self, *, has_prefix: bool = False) -> None:
        self._has_prefix = has_prefix
        self._last: tuple[torch.Tensor, int, torch.Tensor] | None = None  # segments, their version, the mask

    def hidden(self, segments: torch.Tensor | None) -> torch.Tensor | None:
        """[b s] -> bool [b 1 s s], True for tokens of different documents (megatron-core's convention)"""
        if segments is None:
            return None
        last = self._last
        if last is None or last[0] is not segments or last[1] != segments._version:
            self._last = last = (segments, segments._version, self._made(segments))
        return last[2]

    def _made(self, segments: torch.Tensor) -> torch.Tensor:
        if not self._has_prefix:
            return segments[:, None, :, None] != segments[:, None, None, :]
        length = segments.size(1)
        later = ~_causal(length, length, length, segments.device)
        return later & (segments != 0)[:, None, None, :]  # of what comes later, the prefix alone is seen


def hidden_keys(segments: torch.Tensor | None) -> torch.Tensor | None:
    """[b s] -> bool [b 1 1 s], True for padding, that is for all but the first segment"""
    return None if segments is None else (segments != 0)[:, None, None, :]


def visible(
    sq: int,
    sk: int,
    window: int | None,
    hidden: torch.Tensor | None,
    device: torch.device,
    *,
    is_causal: bool = True,
) -> torch.Tensor | None:
    """The mask that SDPA takes, True = seen, [sq sk] or [b 1 sq sk]; None where its causal flag, or none, will do.

    The queries are the last ``sq`` of the ``sk`` positions.
    """
    if not is_causal:
        return None if hidden is None else ~hidden
    if window is not None and window >= sk:
        window = None
    if hidden is None and window is None and (sq == sk or sq == 1):
        return None
    seen = _causal(sq, sk, window or sk, device)
    return seen if hidden is None else seen & ~hidden


def biased(
    bias: torch.Tensor, seen: torch.Tensor | None, sq: int, sk: int, *, is_causal: bool
) -> torch.Tensor:
    """Scores' bias [1 n sq sk] and what is seen as one mask for SDPA, which takes either kind alone."""
    if seen is None and is_causal:
        seen = _causal(sq, sk, sk, bias.device)
    return bias if seen is None else bias.masked_fill(~seen, -torch.inf)


@lru_cache(maxsize=2)
@torch.inference_mode(False)  # a mask first made in an evaluation is later saved for a backward pass
def _causal(sq: int, sk: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [sq sk]: keys at most ``window - 1`` before the query, and none after it"""
    queries = torch.arange(sk - sq, sk, device=device)[:, None]
    distance = queries - torch.arange(sk, device=device)[None]
    return (distance >= 0) & (distance < window)
