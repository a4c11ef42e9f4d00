"""Whether an index is consistent with itself and with the size of its data; reads the index only.

A sequence may be empty, and a document may hold none: megatron-core's `IndexedDatasetBuilder.add_item` writes the
first, and its `preprocess_data.py` the second for a text without tokens.
"""

from collections.abc import Iterator

from data_tools.index_arrays import first_wrong_document, first_wrong_sequence
from data_tools.indexed import IndexedReader


def index_faults(index: IndexedReader) -> Iterator[str]:
    """Each contradiction as one line."""
    lengths, documents = index.sequence_lengths, index.document_indices
    wrong = first_wrong_sequence(lengths, index.sequence_pointers, index.dtype.itemsize)
    if wrong is not None:
        yield f"index: sequence {wrong[0]:,} {wrong[1]}"
    if wrong is None or "negative" not in wrong[1]:
        yield from _size_faults(index)
    entry = first_wrong_document(documents, len(lengths))
    if entry is not None:
        there = f"entry {entry:,} is {documents[entry]:,}" if len(documents) else "there is no entry"
        yield f"index: the documents do not cover its {len(lengths):,} sequences in order ({there})"


def _size_faults(index: IndexedReader) -> Iterator[str]:
    spare, odd_bytes = len(index.tokens) - index.num_tokens, index.data_bytes % index.dtype.itemsize
    if spare:
        yield f"data: {abs(spare):,} tokens {'more' if spare > 0 else 'fewer'} than the index speaks of"
    elif odd_bytes:
        yield f"data: {odd_bytes} bytes more than whole tokens of {index.dtype.name}"
