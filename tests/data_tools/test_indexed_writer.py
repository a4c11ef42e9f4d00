import hashlib
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import IndexedReader
from data_tools.indexed_writer import IndexedWriter
from data_tools.staging import Staging


def test_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    with Staging(tmp_path / "c") as staging:
        with IndexedWriter(staging, dtype=np.dtype(np.int32)) as writer:
            writer.add(np.arange(5, dtype=np.int32), np.array([2, 3]))
            writer.add(np.arange(4, dtype=np.int32), np.array([4]))
        staging.publish()
    assert hashlib.sha256((tmp_path / "c.bin").read_bytes()).hexdigest() == writer.bin_sha256
    assert hashlib.sha256((tmp_path / "c.idx").read_bytes()).hexdigest() == writer.idx_sha256
    assert (writer.num_documents, writer.num_tokens) == (3, 9)
    assert IndexedReader(tmp_path / "c").document(2).tolist() == [0, 1, 2, 3]


def test_tokens_that_do_not_fit_their_lengths_or_type_are_our_fault(tmp_path: Path) -> None:
    with Staging(tmp_path / "c") as staging, IndexedWriter(staging, dtype=np.dtype(np.uint16)) as writer:
        with pytest.raises(AssertionError):
            writer.add(np.zeros(3, np.uint16), np.array([2]))
        with pytest.raises(AssertionError):
            writer.add(np.zeros(2, np.int64), np.array([2]))
        writer.add(np.zeros(2, np.uint16), np.array([2]))


def test_an_error_while_writing_leaves_no_index(tmp_path: Path) -> None:
    with Staging(tmp_path / "c") as staging:
        with pytest.raises(RuntimeError), IndexedWriter(staging, dtype=np.dtype(np.uint16)) as writer:
            writer.add(np.zeros(2, np.uint16), np.array([2]))
            raise RuntimeError
        assert not staging.path(".idx").exists()
