"""Small corpora and inputs for the tests of this folder."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.indexed_writer import IndexedWriter
from data_tools.prepare import Prepared, Recipe, prepare
from data_tools.staging import Staging

REPOSITORY = str(Path(__file__).resolve().parents[2])


def make_index(prefix: Path, documents: Sequence[Sequence[int]], *, dtype: type = np.uint16) -> str:
    """A corpus without a manifest, as Megatron's own tools leave it."""
    return make_sentences(prefix, [[tokens] for tokens in documents], dtype=dtype)


def make_sentences(
    prefix: Path, documents: Sequence[Sequence[Sequence[int]]], *, dtype: type = np.uint16
) -> str:
    """The same, with several sequences in a document."""
    with Staging(prefix) as staging:
        with IndexedWriter(staging, dtype=np.dtype(dtype)) as writer:
            for sentences in documents:
                for tokens in sentences:
                    writer.add_tokens(np.array(tokens, dtype=dtype))
                lengths = np.array([len(tokens) for tokens in sentences], dtype=np.int64)
                writer.add_lengths(lengths, sequences=np.array([len(sentences)]))
        staging.publish()
    return str(prefix)


def write_jsonl(path: Path, texts: Sequence[str], *, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def make_corpus(
    prefix: Path, texts: Sequence[str], *, tokenizer: str = "bytes", force: bool = False
) -> Prepared:
    """A corpus of these texts, made by `prepare` in this process."""
    source = write_jsonl(prefix.parent / f"{prefix.name}.jsonl", texts)
    return prepare(Recipe((str(source),), tokenizer), str(prefix), num_workers=0, force=force)


def words(number: int, *, count: int = 20) -> str:
    """A text that differs from every other number's."""
    return " ".join(f"word{number}x{place}" for place in range(count))
