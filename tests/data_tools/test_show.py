from pathlib import Path

import numpy as np
import pytest

from data_tools import show
from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.tokenizer import load_tokenizer
from tests.data_tools.making import make_corpus, make_index


def test_statistics_count_tokens_with_their_ends(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", ["a", "bcd", "e" * 20])
    told = "\n".join(show.statistics(Corpus(tmp_path / "c")))
    assert "documents   3\n" in told
    assert "tokens      27 (uint16)" in told
    assert "mean 9.0, median 4, shortest 2, longest 21 tokens" in told
    assert "tokenizer   bytes (257 ids)" in told


def test_a_corpus_without_a_manifest_is_shown_too(tmp_path: Path) -> None:
    told = "\n".join(show.statistics(Corpus(make_index(tmp_path / "c", [[1, 2]]))))
    assert "manifest    none" in told


def test_the_histogram_counts_every_document_once() -> None:
    lines = list(show.histogram(np.array([0, 1, 2, 3, 4, 7, 8, 8])))
    counts = {line[:24].split(" to ")[0].strip(): int(line.split("tokens")[1].split()[0]) for line in lines}
    assert counts == {"0": 1, "1": 1, "2": 2, "4": 2, "8": 2}
    assert list(show.histogram(np.array([], dtype=np.int64))) == []


def test_documents_are_decoded_and_cut(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", ["first", "second ☕☕☕☕", "\x1b[31mred"])
    corpus, tokenizer = Corpus(tmp_path / "c"), load_tokenizer("bytes")
    told = list(show.documents(corpus, tokenizer, [1, 2], max_chars=8))
    assert told[0] == "--- document 1, 20 tokens"
    assert told[1] == "second ☕ ... (the first 8 characters)"
    assert told[3] == "�[31mred", "a document must not drive the terminal"


def test_a_document_that_is_not_there_is_told(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", ["a", "b"])
    with pytest.raises(DataError, match=r"document=2: .* has documents 0 to 1"):
        list(show.documents(Corpus(tmp_path / "c"), load_tokenizer("bytes"), [2], max_chars=8))
