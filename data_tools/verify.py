"""Is a corpus what it claims to be?  Reads every byte once and returns each fault as one line."""

import hashlib
from collections.abc import Iterator

import numpy as np

from data_tools.block_hashes import BlockHasher
from data_tools.corpus import Corpus
from data_tools.corpus_check import first_difference
from data_tools.errors import DataError
from data_tools.index_check import index_faults
from data_tools.indexed import idx_path
from data_tools.tokenizer import load_tokenizer

PIECE_TOKENS = 1 << 22


def faults(prefix: str, *, tokenizer: str | None = None) -> Iterator[str]:
    """Everything that is wrong with a corpus; ``tokenizer`` gives the vocabulary if no manifest does."""
    try:
        corpus = Corpus(prefix, check=False)
    except DataError as error:
        yield str(error)
        return
    if (fault := corpus.manifest_fault()) is not None:
        yield fault
    yield from index_faults(corpus.index)
    if (fault := corpus.tokenizer_fault()) is not None:
        yield fault
    yield from _data_faults(corpus, _vocab_size(corpus, tokenizer))
    yield from _ending_faults(corpus)


def _data_faults(corpus: Corpus, vocab_size: int | None) -> Iterator[str]:
    tokens, digest = corpus.index.tokens, hashlib.sha256()
    blocks = corpus.manifest.blocks if corpus.manifest is not None else None
    hasher = BlockHasher(blocks.block_bytes if blocks is not None else None)
    beyond: int | None = None
    for start in range(0, len(tokens), PIECE_TOKENS):
        piece = tokens[start : start + PIECE_TOKENS]
        digest.update(piece.data)
        hasher.update(piece.data)
        if vocab_size is not None and beyond is None:
            wrong = np.flatnonzero((piece >= vocab_size) | (piece < 0))
            beyond = start + int(wrong[0]) if len(wrong) else None
    if beyond is not None:
        yield f"data: token {beyond:,} is id {int(tokens[beyond])}, beyond the vocabulary of {vocab_size:,}"
    if corpus.manifest is None:
        return
    if digest.hexdigest() != corpus.manifest.bin_sha256:
        where = (
            f" ({first_difference(hasher.hashes(), blocks.bin_hashes, blocks.block_bytes)})" if blocks else ""
        )
        yield f"data: the checksum of .bin differs from the manifest's: it was changed since{where}"
    with open(idx_path(corpus.prefix), "rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != corpus.manifest.idx_sha256:
            yield "index: the checksum of .idx differs from the manifest's: it was changed since"


def _ending_faults(corpus: Corpus) -> Iterator[str]:
    """An index of other data nearly always shows here: documents that do not end with their end token."""
    end = corpus.manifest.tokenizer.end_of_document if corpus.manifest else corpus.index.appended_end
    lengths = corpus.index.document_lengths()
    if end is None or int(lengths.sum(dtype=np.int64)) != len(corpus.index.tokens):
        return
    last = np.cumsum(lengths, dtype=np.int64)[lengths > 0] - 1
    wrong = np.flatnonzero(corpus.index.tokens[last] != end)
    if len(wrong):
        yield (
            f"data: {len(wrong):,} of {len(last):,} documents, first {int(wrong[0])}, do not end with id "
            f"{end}: the index is not of this data"
        )


def _vocab_size(corpus: Corpus, tokenizer: str | None) -> int | None:
    if tokenizer is not None:
        return load_tokenizer(tokenizer).vocab_size
    return corpus.manifest.tokenizer.vocab_size if corpus.manifest else None
