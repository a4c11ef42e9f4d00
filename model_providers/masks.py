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
    """The mask of the segments at hand, made once and shared by all layers of a rank."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def hidden(self, segments: torch.Tensor | None) -> torch.Tensor | None:
        """[b s] -> bool [b 1 s s], True for tokens of different documents (megatron-core's convention)"""
        if segments is None:
            return None
        if self._last is None or self._last[0] is not segments:
            self._last = (segments, segments[:, None, :, None] != segments[:, None, None, :])
        return self._last[1]


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
