import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import HEADER
from data_tools.verify import faults
from tests.data_tools.making import make_corpus, make_index

TEXTS = ["a", "bcd", "efghij"]
Damage = Callable[[Path], None]


def patch(path: Path, place: int, data: bytes) -> None:
    whole = path.read_bytes()
    place = place % len(whole)
    path.write_bytes(whole[:place] + data + whole[place + len(data) :])


def cut(suffix: str, num_bytes: int) -> Damage:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}{suffix}")
        path.write_bytes(path.read_bytes()[:-num_bytes])

    return damage


def set_id(place: int, value: int) -> Damage:
    return lambda prefix: patch(Path(f"{prefix}.bin"), 2 * place, np.uint16(value).tobytes())


def set_index(place: int, data: bytes) -> Damage:
    return lambda prefix: patch(Path(f"{prefix}.idx"), place, data)


def take_index_of_other_data(prefix: Path) -> None:
    make_corpus(prefix.parent / "other", ["efghij", "a", "bcd"])  # as many documents, as many tokens
    shutil.copy(prefix.parent / "other.idx", f"{prefix}.idx")


def take_other_tokenizer(prefix: Path) -> None:
    (prefix.parent / f"{prefix.name}.tokenizer" / "tokenizer_config.json").write_text("{}")


def take_other_manifest(prefix: Path) -> None:
    make_corpus(prefix.parent / "other", ["x"])
    shutil.copy(prefix.parent / "other.json", f"{prefix}.json")


def test_a_good_corpus_has_no_faults(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", TEXTS)
    assert list(faults(str(tmp_path / "c"))) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut(".bin", 2), "its index needs 26"),
        (cut(".idx", 4), "its header promises"),
        (lambda prefix: Path(f"{prefix}.idx").unlink(), "no file"),
        (lambda prefix: Path(f"{prefix}.bin").unlink(), "no file"),
        (set_id(0, 300), "token 0 is id 300, beyond the vocabulary of 257"),
        (set_id(0, 65), "checksum of .bin differs"),
        (set_id(1, 65), "1 of 3 documents, first 0, do not end with id 256"),
        (take_index_of_other_data, "the index is not of this data"),
        (take_index_of_other_data, "checksum of .idx differs"),
        (set_index(HEADER.size, np.int32(-2).tobytes()), "sequence 0 has a negative length"),
        (set_index(HEADER.size + 12 + 8, np.int64(2).tobytes()), "sequence 1 does not begin where"),
        (set_index(-8, np.int64(2).tobytes()), "the documents do not cover its 3 sequences"),
        (take_other_tokenizer, "tokenizer: tokenizer="),
        (take_other_manifest, "manifest: it speaks of 1 documents"),
    ],
)
def test_each_damage_is_told(tmp_path: Path, damage: Damage, words: str) -> None:
    make_corpus(tmp_path / "c", TEXTS)
    damage(tmp_path / "c")
    found = list(faults(str(tmp_path / "c")))
    assert any(words in fault for fault in found), found
    assert all("\n" not in fault for fault in found)


def test_another_tokenizer_beside_the_corpus_is_told(tmp_path: Path, bpe_file: str) -> None:
    make_corpus(tmp_path / "c", TEXTS)
    make_corpus(tmp_path / "other", TEXTS, tokenizer=bpe_file)
    shutil.rmtree(tmp_path / "c.tokenizer")
    assert any("carries no tokenizer" in fault for fault in faults(str(tmp_path / "c")))
    shutil.copytree(tmp_path / "other.tokenizer", tmp_path / "c.tokenizer")
    assert any("is not the one that the manifest names" in fault for fault in faults(str(tmp_path / "c")))


def test_more_data_than_the_index_speaks_of_is_told(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", TEXTS)
    with open(tmp_path / "c.bin", "ab") as stream:
        stream.write(b"\0" * 6)
    assert "data: 3 tokens more than the index speaks of" in list(faults(str(tmp_path / "c")))


def test_a_corpus_without_a_manifest_is_checked_against_a_named_tokenizer(tmp_path: Path) -> None:
    prefix = make_index(tmp_path / "c", [[1, 2], [999]])
    assert list(faults(prefix)) == []
    assert list(faults(prefix, tokenizer="bytes")) == [
        "data: token 2 is id 999, beyond the vocabulary of 257"
    ]
