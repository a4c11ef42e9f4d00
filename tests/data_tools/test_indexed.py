"""Both directions against megatron.core's own reader and writer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from data_tools.errors import DataError
from data_tools.indexed import DTYPE_OF_CODE, IndexedReader, token_dtype
from tests.data_tools.making import make_index

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_we_write(tmp_path: Path, dtype: type) -> None:
    prefix = make_index(tmp_path / "c", DOCUMENTS, dtype=dtype)
    theirs = IndexedDataset(prefix)
    assert [theirs[number].tolist() for number in range(len(theirs))] == DOCUMENTS
    assert theirs.index.dtype == dtype
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_megatron_would_write_the_same_bytes(tmp_path: Path) -> None:
    ours = make_index(tmp_path / "ours", DOCUMENTS)
    theirs = megatron_corpus(tmp_path / "theirs", [[document] for document in DOCUMENTS])
    for suffix in (".bin", ".idx"):
        assert Path(ours + suffix).read_bytes() == Path(theirs + suffix).read_bytes()


def test_we_read_what_megatron_writes_with_several_sequences_a_document(tmp_path: Path) -> None:
    sentences = [[[1, 2], [3]], [[4]], [], [[5, 6], [7, 8, 9]]]
    reader = IndexedReader(megatron_corpus(tmp_path / "m", sentences))
    assert reader.num_documents == 4
    assert reader.document_lengths().tolist() == [3, 1, 0, 5]
    assert [reader.document(n).tolist() for n in range(4)] == [[1, 2, 3], [4], [], [5, 6, 7, 8, 9]]
    assert reader.num_tokens == 9


def test_types_agree_with_megatrons() -> None:
    assert {code: dtype.type for code, dtype in DTYPE_OF_CODE.items()} == {
        member.value: DType.dtype_from_code(member.value) for member in DType if "float" not in member.name
    }
    for vocab_size in (10, 65499, 65500, 65536, 200_000):
        assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_a_truncated_data_file_is_told_with_both_sizes(tmp_path: Path) -> None:
    prefix = make_index(tmp_path / "c", DOCUMENTS)
    Path(prefix + ".bin").write_bytes(b"\0" * 10)
    with pytest.raises(DataError, match="has 10 bytes, its index needs 22"):
        IndexedReader(prefix)


def test_a_truncated_index_is_told_with_both_sizes(tmp_path: Path) -> None:
    prefix = make_index(tmp_path / "c", DOCUMENTS)
    index = Path(prefix + ".idx")
    index.write_bytes(index.read_bytes()[:-3])
    with pytest.raises(DataError, match="has 119 bytes, its header promises 122"):
        IndexedReader(prefix)


def test_another_file_is_not_taken_for_an_index(tmp_path: Path) -> None:
    prefix = make_index(tmp_path / "c", DOCUMENTS)
    Path(prefix + ".idx").write_bytes(b"hello")
    with pytest.raises(DataError, match="is not Megatron's indexed format"):
        IndexedReader(prefix)


def test_an_unknown_version_or_type_is_told(tmp_path: Path) -> None:
    prefix = make_index(tmp_path / "c", DOCUMENTS)
    index = Path(prefix + ".idx")
    good = index.read_bytes()
    for place, value in ((9, 2), (17, 7)):
        index.write_bytes(good[:place] + bytes([value]) + good[place + 1 :])
        with pytest.raises(DataError, match="known are version 1"):
            IndexedReader(prefix)


def test_a_missing_corpus_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*c\.idx; give the prefix that `megaloom prepare"):
        IndexedReader(tmp_path / "c")


def test_an_unfinished_corpus_is_told_apart_from_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "c.partial").mkdir()
    with pytest.raises(DataError, match="is not finished"):
        IndexedReader(tmp_path / "c")


def test_an_index_without_documents_opens(tmp_path: Path) -> None:
    reader = IndexedReader(make_index(tmp_path / "empty", []))
    assert (reader.num_documents, reader.num_tokens, len(reader.document_lengths())) == (0, 0, 0)


def megatron_corpus(prefix: Path, documents: list[list[list[int]]]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for sentences in documents:
        for sentence in sentences:
            builder.add_item(torch.tensor(sentence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)
