import shutil
from pathlib import Path

import pytest

from data_tools.corpus import Corpus, shared_vocab_size
from data_tools.errors import DataError
from data_tools.manifest import load_manifest
from tests.data_tools.making import make_corpus, make_index


def test_a_corpus_is_named_by_its_prefix_or_either_file(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", ["a"])
    names = ("c", "c.bin", "c.idx")
    assert {Corpus(tmp_path / name).prefix for name in names} == {str(tmp_path / "c")}


def test_the_fingerprint_follows_the_content_not_the_place_or_the_manifest(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", ["a", "bc"])
    make_corpus(tmp_path / "other", ["ab", "c"])
    for suffix in (".bin", ".idx"):
        shutil.copy(tmp_path / f"c{suffix}", tmp_path / f"copy{suffix}")
    assert load_manifest(tmp_path / "copy") is None
    assert Corpus(tmp_path / "copy").fingerprint == Corpus(tmp_path / "c").fingerprint
    assert Corpus(tmp_path / "other").fingerprint != Corpus(tmp_path / "c").fingerprint


def test_files_of_two_runs_are_told(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", ["a", "b"])
    make_corpus(tmp_path / "d", ["a", "b", "c"])
    shutil.copy(tmp_path / "d.json", tmp_path / "c.json")
    with pytest.raises(DataError, match=r"speaks of 3 documents with 6 tokens .*the files hold 2 with 4"):
        Corpus(tmp_path / "c")


def test_a_broken_manifest_is_told(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", ["a"])
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest=.*c\.json cannot be read .*delete it"):
        Corpus(tmp_path / "c")


def test_a_corpus_without_its_tokenizer_says_how_to_name_one(tmp_path: Path) -> None:
    corpus = Corpus(make_index(tmp_path / "c", [[1]]))
    with pytest.raises(DataError, match=r"carries no tokenizer .*--tokenizer SPEC"):
        corpus.tokenizer()


def test_one_vocabulary_for_all(tmp_path: Path, bpe_file: str) -> None:
    for name in ("a", "b"):
        make_corpus(tmp_path / name, [name])
    make_corpus(tmp_path / "bpe", ["c"], tokenizer=bpe_file)
    make_index(tmp_path / "bare", [[1]])
    a, b, bpe, bare = (Corpus(tmp_path / name) for name in ("a", "b", "bpe", "bare"))
    assert shared_vocab_size([a, b], tokenizer=None) == shared_vocab_size([a, bare], tokenizer="bytes") == 257
    assert shared_vocab_size([bpe], tokenizer=bpe_file) == 300
    with pytest.raises(DataError, match="have different vocabularies: prepare both with one tokenizer"):
        shared_vocab_size([a, bpe], tokenizer=None)
    with pytest.raises(
        DataError, match=r"tokenizer=bytes is not the one of corpus=.*bpe, .*leave tokenizer out"
    ):
        shared_vocab_size([a, bpe], tokenizer="bytes")
    with pytest.raises(DataError, match="has no manifest, so its tokenizer is unknown: name it as tokenizer"):
        shared_vocab_size([a, bare], tokenizer=None)
