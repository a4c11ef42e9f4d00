"""Corpora of Megatron-DeepSpeed's ``preprocess_data.py --append-eod``: the lengths leave out what ends a document.

There (`Encoder.encode` in tools/preprocess_data.py, `add_doc` in megatron/data/indexed_dataset.py) the end-of-document
token is appended to the ids of each document that is not empty, after the lengths of its sentences were taken.  So the
data hold one token more for each such document, while the pointers are the sums of the lengths: read as the index
says, document k begins k tokens early.  megatron-core's own tool adds one to the last sentence's length.
"""

from typing import NamedTuple

import numpy as np

from data_tools.index_arrays import first_wrong_document, first_wrong_sequence, num_without_sequences

MAX_ENDS_LOOKED_AT = 4096


class AppendedEnds(NamedTuple):
    """The sequences as they lie in the data."""

    end: int  # the id that ends documents
    lengths: np.ndarray  # int32 [sequences]
    pointers: np.ndarray  # int64 [sequences], bytes


def find_appended_ends(
    tokens: np.ndarray, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray
) -> AppendedEnds | None:
    """The right sequences if this is such a corpus, else None.

    It is one if the data have exactly one token more for each document that holds a sequence, and documents that are
    laid out so end with the same id: all of up to `MAX_ENDS_LOOKED_AT`, the first and the last among them.
    """
    spare = len(tokens) - int(lengths.sum(dtype=np.int64))
    if spare <= 0 or spare != len(documents) - 1 - num_without_sequences(documents):
        return None
    itemsize = tokens.dtype.itemsize
    if first_wrong_sequence(lengths, pointers, itemsize) or (
        first_wrong_document(documents, len(lengths)) is not None
    ):
        return None
    last = documents[1:][documents[1:] > documents[:-1]] - 1  # the last sequence of each: [spare]
    some = np.unique(np.linspace(0, spare - 1, min(spare, MAX_ENDS_LOOKED_AT)).astype(np.int64))
    ends = tokens[pointers[last[some]] // itemsize + lengths[last[some]] + some]
    if (ends != ends[0]).any():
        return None
    right = lengths.copy()
    right[last] += 1
    starts = np.zeros(len(right), np.int64)
    np.cumsum(right[:-1], dtype=np.int64, out=starts[1:])
    starts *= itemsize
    return AppendedEnds(int(ends[0]), right, starts)
