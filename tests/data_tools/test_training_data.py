import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools import data_check, training_data
from data_tools.config import DataConfig
from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.gpt_dataset import GPTDataset
from data_tools.loader import StepShape
from data_tools.ranks import Ranks
from data_tools.training_data import CACHE_NAME, TrainingData, open_data
from tests.data_tools.damage import flip_a_bit
from tests.data_tools.making import make_corpus, words
from tests.data_tools.test_ranks import run_ranks


@pytest.fixture
def corpora(here: Path) -> Path:
    make_corpus(here / "a", [words(number) for number in range(50)])
    make_corpus(here / "b", [words(number, count=5) for number in range(30)])
    make_corpus(here / "wiki", [words(number + 1000) for number in range(5)])
    return here


def config(**fields: object) -> DataConfig:
    return DataConfig.model_validate({"train": "a", "sequence_length": 16, **fields})


def first_tokens(data: TrainingData, num_samples: int = 30) -> list[list[int]]:
    return [data.train.dataset.sample(number).tokens.tolist() for number in range(num_samples)]


def test_one_corpus_gives_a_training_and_a_validation_set(corpora: Path) -> None:
    data = open_data(config(), num_train_samples=100)
    assert (list(data.validation), list(data.test), data.vocab_size) == (["valid"], [], 257)
    (train,), (valid,) = data.train.dataset.datasets, data.validation["valid"].dataset.datasets
    assert (train.first, train.last, valid.first, valid.last) == (0, 49, 49, 50)
    assert data.tokenizer.decode(data.train.batch([0]).tokens[0])
    assert (corpora / CACHE_NAME).is_dir()


def test_named_sets_come_beside_the_splits_own(corpora: Path) -> None:
    data = open_data(config(train=["a", "b"], split="90,5,5", validation={"wiki": "wiki"}, test={"old": "b"}))
    assert (list(data.validation), list(data.test)) == (["valid", "wiki"], ["test", "old"])
    assert data.validation["wiki"].dataset.datasets[0].last == 5
    assert list(open_data(config(split="1,0,0", validation={"wiki": "wiki"})).validation) == ["wiki"]


def test_prolonging_a_run_keeps_the_order(corpora: Path) -> None:
    short, long = open_data(config(), num_train_samples=10), open_data(config(), num_train_samples=100_000)
    assert first_tokens(short) == first_tokens(long)
    assert short.fingerprint() == long.fingerprint()
    assert short.next_samples_hash(7, num_samples=6) == long.next_samples_hash(7, num_samples=6)


def test_the_seed_changes_the_order_and_the_fingerprint(corpora: Path) -> None:
    one, two = open_data(config()), open_data(config(seed=2))
    assert first_tokens(one) != first_tokens(two)
    assert one.fingerprint() != two.fingerprint()
    valid = [data.validation["valid"].dataset for data in (one, two)]
    assert valid[0].samples_hash(0, 5) == valid[1].samples_hash(0, 5), "evaluations must stay comparable"
    assert open_data(config(documents="reset", mask_boundary_loss=True)).fingerprint() == one.fingerprint()


def test_the_order_does_not_depend_on_the_cache(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = first_tokens(open_data(config(cache="one"), num_train_samples=500), 200)
    (corpora / "file").write_text("")
    assert first_tokens(open_data(config(cache="file/none"), num_train_samples=500), 200) == before
    monkeypatch.setattr(training_data, "MAX_EPOCHS_AHEAD", 1)
    assert first_tokens(open_data(config(cache="two"), num_train_samples=500), 200) == before


def test_a_damaged_cache_is_mended(corpora: Path) -> None:
    before = first_tokens(open_data(config(cache="cache")))
    for path in (corpora / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-8] + b"\xff" * 8)
    assert first_tokens(open_data(config(cache="cache"))) == before


def test_the_options_of_documents_reach_the_batches(corpora: Path) -> None:
    plain = open_data(config()).train.batch([0, 1])
    full = open_data(config(documents="reset", mask_boundary_loss=True)).train.batch([0, 1])
    assert (plain.segments, plain.loss_mask) == (None, None)
    assert full.segments is not None and full.loss_mask is not None


def test_a_tokenizer_may_be_named_and_must_be_the_corpuss_own(corpora: Path, bpe_file: str) -> None:
    assert open_data(config(tokenizer="bytes")).tokenizer.vocab_size == 257
    with pytest.raises(DataError, match="is not the one of corpus=a"):
        open_data(config(tokenizer=bpe_file))
    make_corpus(corpora / "bpe", [words(1)], tokenizer=bpe_file)
    with pytest.raises(DataError, match="different vocabularies"):
        open_data(config(validation={"w": "bpe"}))


def test_a_corpus_of_weight_0_is_not_even_looked_for(corpora: Path) -> None:
    data = open_data(config(train=["a", {"path": "nowhere", "weight": 0}]))
    assert [corpus.prefix for corpus in data.corpora] == ["a"]


def test_a_missing_corpus_is_told(corpora: Path) -> None:
    with pytest.raises(DataError, match=r"corpus=nowhere: no file nowhere\.idx"):
        open_data(config(validation={"w": "nowhere"}))


def test_a_corpus_shorter_than_a_sample_is_told(corpora: Path) -> None:
    with pytest.raises(DataError, match="one sample of sequence_length=100000 needs 100001"):
        open_data(config(sequence_length=100_000))
    with pytest.raises(DataError, match="corpus=wiki: 5 documents hold"):
        open_data(config(sequence_length=2000, split="1,0,0", validation={"wiki": "wiki"}))


def test_a_split_that_leaves_nothing_to_validate_on_is_told(corpora: Path) -> None:
    make_corpus(corpora / "one", [words(1, count=500)])
    with pytest.raises(
        DataError, match=r"split=98,2,0 leaves 0 documents with 0 tokens for 'valid'.*name a corpus"
    ):
        open_data(config(train="one"))
    assert open_data(config(train="one", split="1,0,0")).validation == {}


def test_a_small_corpus_is_left_out_of_validation_with_a_word(
    corpora: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_corpus(corpora / "one", [words(1, count=500)])
    caplog.set_level(logging.WARNING)
    data = open_data(config(train=["a", "one"]))
    assert [part.corpus.prefix for part in data.validation["valid"].dataset.datasets] == ["a"]
    assert "data.split=98,2,0 gives 'valid' too little text of one" in caplog.text


@pytest.mark.parametrize("shared", [True, False])
def test_orders_are_built_once_a_disk_and_all_ranks_read_the_same(
    corpora: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    build = GPTDataset._build

    def counted(self: GPTDataset, epoch: int):  # type: ignore[no-untyped-def]
        built.append(self.cache_name(epoch))
        return build(self, epoch)

    def rank(node: int, ranks: Ranks) -> object:
        folder = "disk" if shared else f"disk{node}"
        data = open_data(config(train=["a", "b"], cache=folder), num_train_samples=300, ranks=ranks)
        return first_tokens(data, 300)

    monkeypatch.setattr(GPTDataset, "_build", counted)
    results = run_ranks(2, 2, rank)
    assert all(result == results[0] for result in results)
    assert len(built) == (1 if shared else 2) * len(set(built)) > 0


def test_a_fault_on_one_rank_ends_all_of_them(corpora: Path) -> None:
    def rank(node: int, ranks: Ranks) -> object:
        try:
            open_data(config(train="a" if node == 0 else "nowhere"), ranks=ranks)
        except DataError as error:
            return str(error)
        return None

    here, _, there, _ = run_ranks(2, 2, rank)
    assert here == there and "corpus=nowhere" in str(there)


@pytest.mark.parametrize("verify", ["sampled", "full"])
def test_one_rank_of_each_node_verifies_and_all_end_with_what_it_finds(
    corpora: Path, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    monkeypatch.setattr(data_check, "BLOCKS_AT_START", 2)
    monkeypatch.setattr(data_check, "BLOCKS_OF_ALL", 2)
    monkeypatch.setattr(training_data, "SECONDS_BETWEEN_VOTES", 0.0)  # a vote after each block
    monkeypatch.setattr("data_tools.indexed_writer.BLOCK_BYTES", 1024)
    make_corpus(corpora / "v", [words(number) for number in range(60)])
    read: list[str] = []
    real = data_check.check_whole

    def counted(corpus: Corpus) -> Iterator[None]:
        read.append(corpus.prefix)
        return real(corpus)

    monkeypatch.setattr(data_check, "check_whole", counted)

    def rank(node: int, ranks: Ranks) -> object:
        try:
            return [
                corpus.prefix
                for corpus in open_data(config(train="v", verify=verify), ranks=ranks).unverified
            ]
        except DataError as error:
            return str(error)

    assert run_ranks(2, 2, rank) == ([["v"], [], ["v"], []] if verify == "sampled" else [[], [], [], []])
    assert read == ([] if verify == "sampled" else ["v", "v"])
    flip_a_bit(-1)(corpora / "v")
    told = run_ranks(2, 2, rank)
    assert len(set(map(str, told))) == 1 and "of .bin (bytes" in str(told[0])


def test_a_builder_that_fails_does_not_leave_the_others_waiting(
    corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = GPTDataset._build
    failed: list[int] = []

    def fails_once(self: GPTDataset, epoch: int):  # type: ignore[no-untyped-def]
        if not failed:
            failed.append(epoch)
            raise MemoryError
        return build(self, epoch)

    def rank(node: int, ranks: Ranks) -> object:
        try:
            return first_tokens(open_data(config(cache="disk"), ranks=ranks), 3)
        except MemoryError:
            return None

    monkeypatch.setattr(GPTDataset, "_build", fails_once)
    results = run_ranks(1, 3, rank)
    assert results[0] is None and results[1] == results[2] is not None


def test_the_facade_trains_and_evaluates(corpora: Path) -> None:
    data = open_data(config(train=[{"path": "a", "weight": 3}, "b"]), num_train_samples=64)
    loader = data.train.loader(StepShape(micro_batch_size=4, num_micro_batches=2, dp_rank=1, dp_size=2))
    step = next(loader)
    loader.close()
    assert [batch.tokens.shape for batch in step] == [(4, 16), (4, 16)]
    assert loader.consumed_samples == 16
    assert data.train.dataset.consumed_by_corpus(16) == {"a": 12, "b": 4}
    assert len(list(data.validation["valid"].evaluation(StepShape(2), num_samples=4))) == 2
