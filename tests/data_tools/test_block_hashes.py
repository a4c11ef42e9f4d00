import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_tools.block_hashes import BlockHasher, block_hash, from_text, to_text
from data_tools.corpus_check import sample_of_blocks


@given(
    data=st.binary(max_size=300),
    cuts=st.lists(st.integers(1, 40), max_size=20),
    block_bytes=st.integers(1, 64),
)
def test_hashes_do_not_depend_on_the_pieces_in_which_bytes_come(
    data: bytes, cuts: list[int], block_bytes: int
) -> None:
    expected = b"".join(
        xxhash.xxh3_64(data[at : at + block_bytes]).digest() for at in range(0, len(data), block_bytes)
    )
    hasher, done = BlockHasher(block_bytes), 0
    for cut in [*cuts, len(data)]:
        hasher.update(memoryview(data)[done : done + cut])
        done += cut
    assert hasher.hashes() == expected
    assert from_text(to_text(expected)) == expected


def test_arrays_are_taken_as_bytes() -> None:
    tokens = np.arange(10, dtype=np.uint16)
    hasher = BlockHasher(8)
    hasher.update(tokens.data)
    assert hasher.hashes()[:8] == block_hash(memoryview(tokens.tobytes())[:8])


def test_what_is_no_list_of_hashes_is_refused() -> None:
    for text in ("AAA", "AAAA", "*"):
        with pytest.raises(ValueError):
            from_text(text)


@given(count=st.integers(0, 500), most=st.integers(2, 40), seed=st.integers(0, 5))
def test_a_sample_has_the_first_and_the_last_block_and_is_the_same_for_a_seed(
    count: int, most: int, seed: int
) -> None:
    found = sample_of_blocks(count, most, seed=seed)
    assert found == sample_of_blocks(count, most, seed=seed) == sorted(set(found))
    assert len(found) == min(count, most) and (not count or {0, count - 1} <= set(found) <= set(range(count)))
