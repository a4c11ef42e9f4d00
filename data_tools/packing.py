"""Where documents begin in a sample, in the forms that attention wants: segments, positions, cumulative
lengths.

A sample of s + 1 tokens gives s inputs and s labels.  ``starts`` are the places among the s + 1 tokens where
a document begins; a sample's first token belongs to its first segment whether a document begins there or not.
"""

import numpy as np


def segments(starts: np.ndarray, *, sequence_length: int) -> np.ndarray:
    """The number of each input's document, counted within the sample: 0,0,0,1,1,2...  int32 [s]."""
    begins = np.zeros(sequence_length, dtype=np.int32)
    begins[starts[(starts > 0) & (starts < sequence_length)]] = 1
    return np.cumsum(begins, dtype=np.int32)


def loss_mask(starts: np.ndarray, *, sequence_length: int) -> np.ndarray:
    """False where the label is the first token of another document than the input's: bool [s]."""
    mask = np.ones(sequence_length, dtype=np.bool_)
    mask[starts[starts > 0] - 1] = False
    return mask


def positions(segment_ids: np.ndarray) -> np.ndarray:
    """Positions that restart at 0 with each segment: [... s] -> int64 [... s]."""
    places = np.arange(segment_ids.shape[-1], dtype=np.int64)
    begins = np.diff(segment_ids, axis=-1, prepend=segment_ids[..., :1]) != 0
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=-1)


def cu_seqlens(segment_ids: np.ndarray) -> np.ndarray:
    """Cumulative segment lengths over rows laid end to end, as variable-length kernels take: [b s] -> int32
    [n + 1].

    Rows never share a segment: each begins a new one.
    """
    rows, length = segment_ids.shape
    begins = np.diff(segment_ids, axis=-1, prepend=-1) != 0  # the first of each row always begins
    return np.append(np.flatnonzero(begins.reshape(-1)), rows * length).astype(np.int32)
