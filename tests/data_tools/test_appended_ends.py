"""Corpora of Megatron-DeepSpeed's --append-eod are read with the token that their lengths leave out."""

import logging
from pathlib import Path

import numpy as np
import pytest

from data_tools.config import DataConfig
from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.indexed import IndexedReader, write_index
from data_tools.merge import merge
from data_tools.training_data import open_data
from data_tools.verify import faults
from tests.data_tools.damage import append_to_bin

END = 256
SENTENCES = [[[1, 2, 3], [4]], [], [[5]], [[6, 7], [], [8, 9]], [[10] * 30]]
DOCUMENTS = [[1, 2, 3, 4, END], [], [5, END], [6, 7, 8, 9, END], [10] * 30 + [END]]


def their_corpus(prefix: Path, documents: list[list[list[int]]] = SENTENCES, end: int | None = END) -> str:
    """As `MMapIndexedDatasetBuilder.add_doc` writes what `Encoder.encode` makes."""
    ids: list[int] = []
    lengths: list[int] = []
    indices = [0]
    for number, sentences in enumerate(documents):
        found = [token for sentence in sentences for token in sentence]
        ids += [*found, *([number if end is None else end] if found else [])]
        lengths += map(len, sentences)
        indices.append(len(lengths))
    np.array(ids, np.uint16).tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as stream:
        write_index(
            stream,
            dtype=np.dtype(np.uint16),
            lengths=np.array(lengths, np.int32),
            document_indices=np.array(indices),
        )
    return str(prefix)


def test_documents_are_read_with_their_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix = their_corpus(tmp_path / "c")
    reader = IndexedReader(prefix)
    assert [reader.document(number).tolist() for number in range(5)] == DOCUMENTS
    assert reader.document_lengths().tolist() == [5, 0, 2, 5, 31]
    assert reader.num_tokens == 43 and reader.appended_end == END
    with caplog.at_level(logging.WARNING):
        Corpus(prefix)
    assert "its lengths leave out the token that ends each document (id 256)" in caplog.text
    assert list(faults(prefix, tokenizer="bytes")) == []


def test_training_and_merging_read_them_so(here: Path) -> None:
    their_corpus(here / "c")
    merge(["c", "c"], "twice")
    assert [IndexedReader("twice").document(number).tolist() for number in range(10)] == 2 * DOCUMENTS
    assert IndexedReader("twice").appended_end is None
    for name in ("c", "twice"):
        config = DataConfig(train=name, sequence_length=2, split="1,0,0", tokenizer="bytes")  # type: ignore[arg-type]
        dataset = open_data(config).train.dataset
        seen = np.concatenate(
            [dataset.sample(number).tokens[:-1] for number in range(dataset.num_distinct_samples())]
        )
        assert (seen == END).sum() >= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda prefix: their_corpus(prefix, end=None), "4 tokens more than the index speaks of"),
        (lambda prefix: cut(prefix, 2), "3 tokens more than the index speaks of"),
        (append_to_bin(b"\0\1"), "5 tokens more than the index speaks of"),
    ],
    ids=["different ends", "one end missing", "one token more"],
)
def test_what_only_resembles_them_is_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    their_corpus(tmp_path / "c")
    change(tmp_path / "c")
    with pytest.raises(DataError, match=message):
        Corpus(tmp_path / "c")


def cut(prefix: Path, num_bytes: int) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-num_bytes])
