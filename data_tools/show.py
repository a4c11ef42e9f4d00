"""What a corpus holds, for the eye: counts, a histogram of document lengths, documents as text."""

from collections.abc import Iterator, Sequence

import numpy as np

from data_tools.block_hashes import HASH_BYTES
from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.manifest import Manifest
from data_tools.tokenizer import Tokenizer

NAME_WIDTH = 12
BAR_WIDTH = 40


def statistics(corpus: Corpus) -> Iterator[str]:
    """Lines of ``name value`` on the size and the origin of a corpus."""
    lengths, manifest = corpus.index.document_lengths(), corpus.manifest
    rows = [
        ("corpus", corpus.prefix),
        ("documents", f"{corpus.index.num_documents:,}"),
        ("tokens", f"{corpus.index.num_tokens:,} ({corpus.index.dtype.name})"),
    ]
    if len(lengths):
        middle = f"mean {lengths.mean():,.1f}, median {np.median(lengths):,.0f}"
        rows.append(("length", f"{middle}, shortest {lengths.min():,}, longest {lengths.max():,} tokens"))
    if manifest is None:
        rows.append(("manifest", "none: the corpus was not written by megaloom"))
    else:
        text_per_token = manifest.text_bytes / max(1, manifest.tokens)
        left_out = (
            ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items()) or "0 records"
        )
        rows += [
            ("text", f"{manifest.text_bytes:,} bytes, {text_per_token:.2f} per token"),
            ("tokenizer", f"{manifest.tokenizer.spec} ({manifest.tokenizer.vocab_size:,} ids)"),
            ("manifest", f"format {manifest.format}, {_hashes(manifest)}"),
            ("inputs", _few([record.path for record in manifest.inputs])),
            ("left out", left_out),
        ]
    return (f"{name:<{NAME_WIDTH}}{value}" for name, value in rows)


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """One line per doubling of the document length: how many documents, and a bar."""
    if not len(lengths):
        return
    doublings = np.frexp(np.maximum(lengths, 0).astype(np.float64))[
        1
    ]  # length in [2^(k-1), 2^k) -> k; 0 -> 0
    counts = np.bincount(doublings)
    first, largest = int(np.flatnonzero(counts)[0]), int(counts.max())
    for doubling in range(first, len(counts)):
        low, high = (0, 0) if doubling == 0 else (1 << (doubling - 1), (1 << doubling) - 1)
        count = int(counts[doubling])
        bar = "█" * -(-count * BAR_WIDTH // largest)
        yield f"{low:>10,} to {high:>10,} tokens {count:>12,} {bar}"


def documents(
    corpus: Corpus, tokenizer: Tokenizer, numbers: Sequence[int], *, max_chars: int
) -> Iterator[str]:
    """Documents as text, each under a line that names it."""
    for number in numbers:
        if not 0 <= number < corpus.index.num_documents:
            raise DataError(
                f"document={number}: {corpus.prefix} has documents 0 to {corpus.index.num_documents - 1}"
            )
        tokens = corpus.index.document(number)
        # A token is at least one byte of text, so this many are enough for max_chars characters of it.
        text = _printable(tokenizer.decode(tokens[: 4 * max_chars + 1]))
        cut = "" if len(text) <= max_chars else f" ... (the first {max_chars} characters)"
        yield f"--- document {number}, {len(tokens):,} tokens"
        yield text[:max_chars] + cut


def _printable(text: str) -> str:
    """Control characters could drive the reader's terminal: shown as a replacement sign."""
    return "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text)


def _hashes(manifest: Manifest) -> str:
    blocks = manifest.blocks
    if blocks is None:
        return "a SHA-256 of each file"
    count = (len(blocks.idx_hashes) + len(blocks.bin_hashes)) // HASH_BYTES
    return f"a SHA-256 of each file, hashes of {count:,} blocks of {blocks.block_bytes:,} bytes"


def _few(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more" if names else "none"
