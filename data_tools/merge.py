"""Several corpora into one, as safely as they were made: aside first, then renamed, the index last."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.indexed import idx_path
from data_tools.indexed_writer import IndexedWriter
from data_tools.manifest import Manifest
from data_tools.staging import Staging

PIECE_TOKENS = 1 << 22


def merge(prefixes: Sequence[str], out: str, *, force: bool = False) -> Manifest | None:
    """Write the documents of all ``prefixes``, in order, to ``out``; returns its manifest, if any."""
    corpora = [Corpus(prefix) for prefix in prefixes]
    _check_mergeable(corpora)
    _check_place(out, corpora, force=force)
    with Staging(out) as staging:
        with IndexedWriter(staging, dtype=corpora[0].index.dtype) as writer:
            for corpus in corpora:
                _append(writer, corpus)
        manifest = _sum_of([corpus.manifest for corpus in corpora if corpus.manifest], writer)
        if manifest is not None:
            corpora[0].tokenizer().save(staging.path(".tokenizer"))
            staging.path(".json").write_bytes(manifest.to_bytes())
        staging.publish()
    return manifest


def _append(writer: IndexedWriter, corpus: Corpus) -> None:
    index, digest = corpus.index, hashlib.sha256()
    for start in range(0, len(index.tokens), PIECE_TOKENS):
        tokens = index.tokens[start : start + PIECE_TOKENS]
        digest.update(tokens.data)
        writer.add_tokens(tokens)
    if corpus.manifest is not None and digest.hexdigest() != corpus.manifest.bin_sha256:
        raise DataError(
            f"corpus={corpus.prefix} is damaged (the checksum of .bin differs from the manifest's): prepare it again "
            "before merging"
        )
    writer.add_lengths(index.sequence_lengths, sequences=np.diff(index.document_indices))


def _check_mergeable(corpora: list[Corpus]) -> None:
    if len(corpora) < 2:
        raise DataError("corpora to merge: give at least two prefixes")
    first = corpora[0]
    for other in corpora[1:]:
        if _kind(first) != _kind(other):
            raise DataError(
                f"corpora {first.prefix} ({_words(first)}) and {other.prefix} ({_words(other)}) cannot be "
                f"merged: prepare both with one tokenizer and the same end-of-document choice"
            )


def _check_place(out: str, corpora: list[Corpus], *, force: bool) -> None:
    if Path(out).resolve() in [Path(corpus.prefix).resolve() for corpus in corpora]:
        raise DataError(f"out={out} is one of the corpora to merge: choose another --out")
    if idx_path(out).exists() and not force:
        raise DataError(f"out={out} holds a corpus already: choose another --out, or replace it by --force")


def _kind(corpus: Corpus) -> tuple[object, ...]:
    manifest = corpus.manifest
    if manifest is None:
        return (corpus.index.dtype,)
    return (corpus.index.dtype, manifest.tokenizer.fingerprint, manifest.tokenizer.end_of_document)


def _words(corpus: Corpus) -> str:
    dtype, manifest = corpus.index.dtype.name, corpus.manifest
    if manifest is None:
        return f"{dtype}, no manifest"
    end = manifest.tokenizer.end_of_document
    return f"{dtype}, tokenizer {manifest.tokenizer.spec}, end of document {'none' if end is None else end}"


def _sum_of(parts: list[Manifest], writer: IndexedWriter) -> Manifest | None:
    if not parts:
        return None
    reasons = sorted({reason for part in parts for reason in part.skipped})
    return Manifest(
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        text_bytes=sum(part.text_bytes for part in parts),
        dtype=writer.dtype.name,
        tokenizer=parts[0].tokenizer,
        inputs=tuple(record for part in parts for record in part.inputs),
        skipped={reason: sum(part.skipped.get(reason, 0) for part in parts) for reason in reasons},
        options={"merged": [part.options for part in parts]},
        bin_sha256=writer.bin_sha256,
        idx_sha256=writer.idx_sha256,
        blocks=writer.blocks,
    )
