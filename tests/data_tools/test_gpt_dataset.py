from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.gpt_dataset import GPTDataset
from data_tools.index_cache import IndexCache
from tests.data_tools.making import make_index, make_sentences


def dataset(
    prefix: str,
    *,
    s: int = 4,
    seed: int = 1,
    first: int = 0,
    last: int | None = None,
    vocab_size: int | None = None,
) -> GPTDataset:
    corpus = Corpus(prefix)
    last = corpus.index.num_documents if last is None else last
    cache = IndexCache(Path(prefix).parent / "cache")
    return GPTDataset(
        corpus, sequence_length=s, seed=seed, first=first, last=last, cache=cache, vocab_size=vocab_size
    )


def numbered(prefix: Path, lengths: list[int]) -> str:
    """Documents whose tokens are 100 * (document + 1) + place, so that each token says where it is from."""
    return make_index(
        prefix, [[100 * (d + 1) + place for place in range(length)] for d, length in enumerate(lengths)]
    )


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    s=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_an_epoch_reads_each_token_once_in_whole_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], s: int, seed: int
) -> None:
    data = dataset(numbered(tmp_path_factory.mktemp("c") / "c", lengths), s=s, seed=seed)
    assert data.samples_per_epoch == max(0, (sum(lengths) - 1) // s)
    if not data.samples_per_epoch:
        return
    samples = [data.sample(number) for number in range(data.samples_per_epoch)]
    assert all(len(sample.tokens) == s + 1 for sample in samples)
    # Put back in the order of the epoch, the samples are the documents laid end to end.
    line = {}
    order = data.document_order(0)["documents"]
    laid = np.concatenate([data.corpus.index.document(document) for document in order])
    for sample in samples:
        place = int(np.flatnonzero(laid == sample.tokens[0])[0])
        assert laid[place : place + s + 1].tolist() == sample.tokens.tolist()
        assert place % s == 0
        line[place] = sample
        begins = [i for i, token in enumerate(sample.tokens) if token % 100 == 0]
        assert sample.starts.tolist() == begins
    assert sorted(line) == list(range(0, data.samples_per_epoch * s, s))


def test_the_order_is_a_function_of_the_facts_alone(tmp_path: Path) -> None:
    prefix = numbered(tmp_path / "a" / "c", [7, 9, 30, 2, 11])
    copy = numbered(tmp_path / "b" / "copy", [7, 9, 30, 2, 11])
    one, two = dataset(prefix), dataset(copy)
    for number in (50, 3, 0, 20, 3):  # asked in any order, from any place, with a cache or without
        assert one.sample(number).tokens.tolist() == two.sample(number).tokens.tolist()


def test_seed_epoch_and_corpus_each_change_the_order(tmp_path: Path) -> None:
    prefix = numbered(tmp_path / "c", [10] * 10)
    data = dataset(prefix)
    count = data.samples_per_epoch
    orders = {
        "first": [tuple(data.sample(n).tokens) for n in range(count)],
        "second epoch": [tuple(data.sample(count + n).tokens) for n in range(count)],
        "seed": [tuple(dataset(prefix, seed=2).sample(n).tokens) for n in range(count)],
    }
    assert len(set(map(tuple, orders.values()))) == 3
    documents = [tuple(data.document_order(epoch)["documents"]) for epoch in range(3)]
    assert len(set(documents)) == 3 and all(sorted(order) == list(range(10)) for order in documents)


def test_a_part_reads_its_documents_only(tmp_path: Path) -> None:
    data = dataset(numbered(tmp_path / "c", [9] * 6), first=2, last=5)
    seen = {
        int(token) // 100 - 1
        for number in range(data.samples_per_epoch)
        for token in data.sample(number).tokens
    }
    assert seen == {2, 3, 4}


def test_documents_of_several_sequences_are_read_whole(tmp_path: Path) -> None:
    one = dataset(numbered(tmp_path / "a", [5, 3]))
    prefix = make_sentences(tmp_path / "b", [[[100, 101], [102], [103, 104]], [[200, 201, 202]]])
    two = dataset(prefix)
    laid = [two.corpus.index.document(document).tolist() for document in range(2)]
    assert laid == [one.corpus.index.document(document).tolist() for document in range(2)]
    assert two.sample(0).starts.size


def test_runs_of_another_sequence_length_share_the_document_order(tmp_path: Path) -> None:
    prefix = numbered(tmp_path / "c", [20] * 5)
    short, long = dataset(prefix, s=4), dataset(prefix, s=16)
    assert short.cache_name(0) == long.cache_name(0)
    assert (
        len({dataset(prefix).cache_name(0), dataset(prefix, seed=2).cache_name(0), short.cache_name(1)}) == 3
    )
    assert dataset(prefix, last=4).cache_name(0) != short.cache_name(0)


def test_a_corpus_shorter_than_a_sample_is_told_with_the_numbers(tmp_path: Path) -> None:
    data = dataset(numbered(tmp_path / "c", [3, 1]), s=4)
    with pytest.raises(
        DataError, match=r"2 documents hold 4 tokens, one sample of sequence_length=4 needs 5"
    ):
        data.check()
    dataset(numbered(tmp_path / "d", [3, 2]), s=4).check()
