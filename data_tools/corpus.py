"""A finished corpus: its tokens, its manifest if it has one, its tokenizer, and a fingerprint of its own."""

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from data_tools.errors import DataError
from data_tools.index_check import index_faults
from data_tools.indexed import IndexedReader, idx_path
from data_tools.manifest import Manifest, TokenizerRecord, load_manifest
from data_tools.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


class Corpus:
    """Opens ``PREFIX`` (``PREFIX.bin`` means the same) and checks its index and that its parts belong together.

    Bytes are checked by `corpus_check`.
    """

    def __init__(self, path: str | Path, *, check: bool = True):
        self.prefix = str(Path(str(path).removesuffix(".bin").removesuffix(".idx")).expanduser())
        self.manifest: Manifest | None = load_manifest(self.prefix)
        self.index = IndexedReader(self.prefix, appended_ends=self.manifest is None)
        if check:
            self.check()

    def check(self) -> None:
        """Refuse an index that contradicts itself, its data or the manifest; reads the index once."""
        for fault in index_faults(self.index):
            raise DataError(f"corpus={self.prefix} is damaged ({fault}): copy it again, or prepare it again")
        if (told := self.manifest_fault()) is not None:
            raise DataError(f"corpus={self.prefix}: {told}; prepare it again, or delete {self.prefix}.json")
        if self.index.appended_end is not None:
            logger.warning(
                "corpus=%s: its lengths leave out the token that ends each document (id %d), as Megatron-DeepSpeed's "
                "preprocess_data.py --append-eod writes them; documents are read with it",
                self.prefix,
                self.index.appended_end,
            )

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

    def tokenizer_fault(self) -> str | None:
        """What is wrong with the tokenizer that was saved with the corpus, if there is one to compare it to."""
        if self.manifest is None:
            return None
        try:
            found = self.tokenizer().fingerprint
        except DataError as error:
            return f"tokenizer: {error}"
        if found == self.manifest.tokenizer.fingerprint:
            return None
        return f"tokenizer: {self.prefix}.tokenizer/ is not the one that the manifest names"

    def beyond_vocabulary(self, token: int, vocab_size: int) -> str:
        """The sentence about a token of the data whose id the vocabulary does not have."""
        document, offset = self.index.locate(token)
        return (
            f"corpus={self.prefix}: token {offset:,} of document {document:,} is id {int(self.index.tokens[token])}, "
            f"beyond the vocabulary of {vocab_size:,} ids: prepare the corpus with the run's tokenizer, or name the "
            f"one that made it in data.tokenizer (megaloom data verify {self.prefix} --tokenizer SPEC checks all ids)"
        )

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
