from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus import Corpus
from data_tools.data_check import DataCheck
from data_tools.errors import DataError
from data_tools.manifest import load_manifest
from data_tools.merge import merge
from data_tools.verify import faults
from tests.data_tools.damage import flip_a_bit, to_format_1
from tests.data_tools.making import make_corpus, make_index, make_sentences


def test_a_merge_equals_preparing_both_at_once(tmp_path: Path) -> None:
    make_corpus(tmp_path / "a", ["a", "bc"])
    make_corpus(tmp_path / "b", ["def", ""])
    make_corpus(tmp_path / "both", ["a", "bc", "def"])
    merged = merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    assert merged is not None and merged == load_manifest(tmp_path / "out")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"both{suffix}").read_bytes()
    assert (merged.documents, merged.tokens, merged.text_bytes, merged.skipped) == (3, 9, 6, {"empty": 1})
    assert [Path(record.path).name for record in merged.inputs] == ["a.jsonl", "b.jsonl"]
    assert list(faults(str(tmp_path / "out"))) == []


def test_sentences_keep_their_documents(tmp_path: Path) -> None:
    one = make_sentences(tmp_path / "one", [[[1, 2], [3]], [[4]]])
    two = make_sentences(tmp_path / "two", [[[5], [6], [7, 8]]])
    assert merge([one, two], str(tmp_path / "out")) is None
    index = Corpus(tmp_path / "out").index
    assert index.document_lengths().tolist() == [3, 1, 4]
    assert index.document_indices.tolist() == [0, 2, 3, 6]
    assert index.document(2).tolist() == [5, 6, 7, 8]


def test_what_cannot_be_merged_is_told(tmp_path: Path, bpe_file: str) -> None:
    for name in ("a", "b"):
        make_corpus(tmp_path / name, ["x"])
    make_corpus(tmp_path / "bpe", ["x"], tokenizer=bpe_file)
    make_index(tmp_path / "bare", [[1]])
    make_index(tmp_path / "wide", [[1]], dtype=np.int32)
    a, b, bpe, bare, wide = (str(tmp_path / name) for name in ("a", "b", "bpe", "bare", "wide"))
    out = str(tmp_path / "out")
    for pair in ([a, bpe], [a, bare], [bare, wide]):
        with pytest.raises(DataError, match="cannot be merged: prepare both with one tokenizer"):
            merge(pair, out)
    with pytest.raises(DataError, match="give at least two prefixes"):
        merge([a], out)
    with pytest.raises(DataError, match="is one of the corpora to merge"):
        merge([a, b], a)
    assert not Path(out + ".idx").exists()


def test_an_existing_corpus_is_kept_unless_forced(tmp_path: Path) -> None:
    for name in ("a", "b", "out"):
        make_corpus(tmp_path / name, [name])
    pair, out = [str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out")
    with pytest.raises(DataError, match="holds a corpus already"):
        merge(pair, out)
    assert Corpus(out).index.num_documents == 1
    merge(pair, out, force=True)
    assert Corpus(out).index.num_documents == 2


def test_a_damaged_corpus_is_not_merged(tmp_path: Path) -> None:
    make_corpus(tmp_path / "a", ["x"])
    make_corpus(tmp_path / "b", ["x"])
    with open(tmp_path / "b.bin", "ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(DataError, match=r"is damaged .*1 tokens more than the index speaks of"):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))


def test_damaged_data_get_no_fresh_checksum(tmp_path: Path) -> None:
    make_corpus(tmp_path / "a", ["x"])
    make_corpus(tmp_path / "b", ["yz"])
    flip_a_bit(0)(tmp_path / "b")
    with pytest.raises(DataError, match=r"corpus=.*b is damaged .*prepare it again before merging"):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_a_merged_corpus_has_hashes_of_its_own(tmp_path: Path) -> None:
    for name in "ab":
        make_corpus(tmp_path / name, [name * 5])
        to_format_1(tmp_path / name)
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    corpus = Corpus(tmp_path / "out")
    assert corpus.manifest is not None and corpus.manifest.format == 2
    DataCheck([corpus], verify="sampled", seed=0, vocab_size=257).at_start()
