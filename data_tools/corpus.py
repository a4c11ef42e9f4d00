"""A finished corpus: its tokens, its manifest if it has one, its tokenizer, and a fingerprint of its own."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from data_tools.errors import DataError
from data_tools.indexed import IndexedReader, idx_path
from data_tools.manifest import Manifest, TokenizerRecord, load_manifest
from data_tools.tokenizer import Tokenizer, load_tokenizer


class Corpus:
    """Opens ``PREFIX`` (``PREFIX.bin`` means the same) and checks that its parts belong together."""

    def __init__(self, path: str | Path, *, check: bool = True):
        self.prefix = str(Path(str(path).removesuffix(".bin").removesuffix(".idx")).expanduser())
        self.index = IndexedReader(self.prefix)
        self.manifest: Manifest | None = load_manifest(self.prefix)
        fault = self.manifest_fault() if check else None
        if fault is not None:
            raise DataError(f"corpus={self.prefix}: {fault}; prepare it again, or delete {self.prefix}.json")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the index: the same wherever a corpus is copied to, with or without a manifest."""
        if self.manifest is not None:
            return self.manifest.idx_sha256
        with open(idx_path(self.prefix), "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was saved with the corpus."""
        folder = Path(f"{self.prefix}.tokenizer")
        if not folder.is_dir():
            raise DataError(
                f"corpus={self.prefix} carries no tokenizer (no folder {folder}): name one, "
                f"as tokenizer=SPEC in a run file or as --tokenizer SPEC"
            )
        return load_tokenizer(str(folder))

    def manifest_fault(self) -> str | None:
        """How the manifest contradicts the files, if it does."""
        if self.manifest is None:
            return None
        said = (self.manifest.documents, self.manifest.tokens, self.manifest.dtype)
        found = (self.index.num_documents, self.index.num_tokens, self.index.dtype.name)
        if said == found:
            return None
        return (
            f"manifest: it speaks of {said[0]} documents with {said[1]} tokens of {said[2]}, the files hold "
            f"{found[0]} with {found[1]} of {found[2]}: they are of two runs"
        )


def shared_vocab_size(corpora: Sequence[Corpus], *, tokenizer: str | None) -> int:
    """The size of the vocabulary that all corpora share; refuses a set that was made by several tokenizers.

    Args:
        tokenizer: the one that a run names; None takes the corpora's own.
    """
    known = [(corpus.prefix, corpus.manifest.tokenizer) for corpus in corpora if corpus.manifest]
    if tokenizer is not None:
        return _named_vocab_size(tokenizer, known)
    for corpus in corpora:
        if corpus.manifest is None:
            raise DataError(
                f"corpus={corpus.prefix} has no manifest, so its tokenizer is unknown: name it as tokenizer"
            )
    first_prefix, first = known[0]
    for prefix, record in known[1:]:
        if record.fingerprint != first.fingerprint:
            raise DataError(
                f"corpora {first_prefix} (tokenizer {first.spec}) and {prefix} (tokenizer {record.spec}) "
                f"have different vocabularies: prepare both with one tokenizer"
            )
    return first.vocab_size


def _named_vocab_size(spec: str, known: list[tuple[str, TokenizerRecord]]) -> int:
    tokenizer = load_tokenizer(spec)
    for prefix, record in known:
        if record.fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"tokenizer={spec} is not the one of corpus={prefix}, which was prepared with {record.spec}: "
                f"leave tokenizer out to take the corpus's own, or prepare the corpus again"
            )
    return tokenizer.vocab_size
