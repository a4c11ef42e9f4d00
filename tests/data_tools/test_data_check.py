"""A corpus that is not what its index or its manifest says is refused in one line before it is trained on."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_tools import block_hashes, corpus_check, data_check
from data_tools.background_check import BackgroundCheck
from data_tools.config import DataConfig
from data_tools.corpus import Corpus
from data_tools.corpus_check import sample_of_blocks
from data_tools.data_check import DataCheck
from data_tools.errors import DataError
from data_tools.training_data import check_data, open_data
from data_tools.verified import Verified
from tests.data_tools import damage as d
from tests.data_tools.damage import Damage
from tests.data_tools.making import make_corpus, make_index, words

BLOCK_BYTES = 256  # in these tests
NUM_DOCUMENTS = 40


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module, name in (
        (block_hashes, "BLOCK_BYTES"),
        (corpus_check, "BLOCK_BYTES"),
        (data_check, "BLOCK_BYTES"),
    ):
        monkeypatch.setattr(module, name, BLOCK_BYTES)
    monkeypatch.setattr("data_tools.indexed_writer.BLOCK_BYTES", BLOCK_BYTES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def prefix(here: Path, small_blocks: None) -> Path:
    make_corpus(here / "c", [words(number) for number in range(NUM_DOCUMENTS)])
    return here / "c"


def config(**changes: object) -> DataConfig:
    return DataConfig(**{"train": "c", "sequence_length": 16, "split": "1,0,0", **changes})  # type: ignore[arg-type]


INDEX_DAMAGE = {
    "negative document": (
        d.set_document(3, -1),
        "documents do not cover its 40 sequences in order (entry 3 is -1)",
    ),
    "swapped documents": (d.edit_index(d.swap_documents), "documents do not cover its 40 sequences in order"),
    "document past the end": (d.set_document(5, 4000), "documents do not cover its 40 sequences in order"),
    "last document past the end": (
        d.set_document(-1, 41),
        "documents do not cover its 40 sequences in order",
    ),
    "half coverage": (d.edit_index(d.cover_half), "documents do not cover its 40 sequences in order"),
    "first document": (d.set_document(0, 1), "documents do not cover its 40 sequences in order"),
    "negative length": (d.set_length(4, -5), "sequence 4 has a negative length"),
    "longer": (d.set_length(4, 5000), "sequence 5 does not begin where the one before it ends"),
    "lengths, sum kept": (
        d.edit_index(d.move_a_token),
        "sequence 2 does not begin where the one before it ends",
    ),
    "negative pointer": (d.set_pointer(7, -2), "sequence 7 does not begin where the one before it ends"),
    "pointer": (d.set_pointer(0, 2), "sequence 0 does not begin where the one before it ends"),
    "more data": (d.append_to_bin(b"\0" * 6), "3 tokens more than the index speaks of"),
    "half a token more": (d.append_to_bin(b"\0"), "1 bytes more than whole tokens of uint16"),
}
HASH_DAMAGE = {
    "boundary moved": (
        d.edit_index(d.move_a_boundary),
        "block 0 of .idx (bytes 0 to 255) is not what was prepared",
    ),
    "another .bin": (d.exchange_bin, "block 0 of .bin (bytes 0 to 255) is not what was prepared"),
    "block exchanged": (
        d.exchange_block(256, 3),
        "block 3 of .bin (bytes 768 to 1023) is not what was prepared",
    ),
    "one bit": (d.flip_a_bit(2000), "block 7 of .bin (bytes 1792 to 2047) is not what was prepared"),
    "last byte": (d.flip_a_bit(-1), "of .bin (bytes "),
}


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "none"])
@pytest.mark.parametrize(("damage", "message"), INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def test_an_index_that_contradicts_itself_or_the_data_is_refused(
    prefix: Path, damage: Damage, message: str, manifest: bool
) -> None:
    damage(prefix)
    if not manifest:
        d.without_manifest(prefix)
    refuses_in_one_line(message, verify="off", **({} if manifest else {"tokenizer": "bytes"}))


@pytest.mark.parametrize(("damage", "message"), HASH_DAMAGE.values(), ids=HASH_DAMAGE)
def test_bytes_that_were_not_prepared_are_refused(
    prefix: Path, damage: Damage, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_check, "BLOCKS_AT_START", 1000)
    damage(prefix)
    refuses_in_one_line(message)
    open_data(config(verify="off"))


@pytest.mark.parametrize("damage", [case[0] for case in HASH_DAMAGE.values()], ids=HASH_DAMAGE)
def test_a_manifest_of_format_1_is_checked_by_its_sums(prefix: Path, damage: Damage) -> None:
    d.to_format_1(prefix)
    open_data(config())
    damage(prefix)
    refuses_in_one_line("is not what was prepared (its SHA-256 differs)")


def refuses_in_one_line(message: str, **changes: object) -> None:
    """On the ranks and before any starts."""
    for check in (check_data, open_data):
        with pytest.raises(DataError) as told:
            check(config(**changes))
        assert (
            message in str(told.value)
            and str(told.value).startswith("corpus=c")
            and "\n" not in str(told.value)
        )


def test_format_1_is_read_once_on_a_host_and_again_when_a_file_changed(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    d.to_format_1(prefix)
    open_data(config())
    reads = count_reads(monkeypatch)
    open_data(config())
    assert reads == []
    shutil.copy("c.bin", "copy.bin")
    shutil.move("copy.bin", "c.bin")
    open_data(config())
    assert reads == ["c.bin"]
    open_data(config(verify="full"))  # relies on nothing that is remembered
    assert reads == ["c.bin", "c.bin"]


def test_a_large_corpus_of_format_1_is_left_to_the_background(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    d.to_format_1(prefix)
    monkeypatch.setattr(data_check, "WHOLE_AT_START_BYTES", 100)
    assert [corpus.prefix for corpus in open_data(config()).unverified] == ["c"]
    BackgroundCheck(open_data(config()).unverified).wait()
    assert open_data(config()).unverified == ()


def test_many_processes_may_remember_at_once(prefix: Path, tmp_path: Path) -> None:
    corpus, verified = Corpus(prefix), Verified(tmp_path / "m")
    assert corpus not in verified
    key = verified.key(corpus)
    threads = [threading.Thread(target=verified.remember, args=(key,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert corpus in verified and len(list((tmp_path / "m").iterdir())) == 1
    Verified(tmp_path / "c.json").remember(key)  # a folder that cannot be made costs time only


def test_some_blocks_at_the_start_the_rest_in_the_background(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_check, "BLOCKS_AT_START", 3)
    monkeypatch.setattr(data_check, "BLOCKS_OF_ALL", 3)
    count = -(-Path("c.bin").stat().st_size // BLOCK_BYTES)
    checked = sample_of_blocks(count, 3, seed=config().seed)
    assert len(checked) == 3 and {0, count - 1} < set(checked)
    other = next(number for number in range(count) if number not in checked)
    whole = Path("c.bin").read_bytes()
    d.flip_a_bit(checked[1] * BLOCK_BYTES)(prefix)
    refuses_in_one_line(f"block {checked[1]} of .bin")
    Path("c.bin").write_bytes(whole)
    d.flip_a_bit(other * BLOCK_BYTES)(prefix)
    data = open_data(config())
    background = BackgroundCheck(data.unverified)
    background.wait()
    assert background.fault is not None and f"corpus=c: block {other} of .bin (bytes " in background.fault
    refuses_at_ranks(f"block {other} of .bin", verify="full")
    Path("c.bin").write_bytes(whole)
    background = BackgroundCheck(open_data(config()).unverified)
    background.wait()
    assert background.fault is None
    assert open_data(config()).unverified == ()  # remembered
    assert [corpus.prefix for corpus in open_data(config(verify="off")).unverified] == []


def refuses_at_ranks(message: str, **changes: object) -> None:
    with pytest.raises(DataError, match="corpus=c: ") as told:
        open_data(config(**changes))
    assert message in str(told.value)


def test_a_corpus_that_is_removed_does_not_end_the_run(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_check, "BLOCKS_OF_ALL", 3)
    monkeypatch.setattr(data_check, "BLOCKS_AT_START", 3)
    unverified = open_data(config()).unverified
    Path("c.bin").unlink()
    background = BackgroundCheck(unverified)
    background.wait()
    assert background.fault is None and len(unverified) == 1


def test_verify_changes_no_sample_and_no_fingerprint(prefix: Path) -> None:
    sampled, full, off = (open_data(config(verify=verify)) for verify in ("sampled", "full", False))
    assert sampled.fingerprint() == full.fingerprint() == off.fingerprint()
    assert off.config.verify == "off"  # as YAML 1.1 reads it


def test_many_corpora_share_a_budget_of_blocks(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_check, "BLOCKS_OF_ALL", 8)
    reads: list[int] = []
    real = corpus_check.bin_faults

    def counted(corpus: Corpus, numbers: list[int]) -> Iterator[str | None]:
        reads.append(len(numbers))
        return real(corpus, numbers)

    monkeypatch.setattr(data_check, "bin_faults", counted)
    DataCheck([Corpus(prefix)] * 3, verify="sampled", seed=1, vocab_size=257).at_start()
    assert reads == [2, 2, 2]


def test_ids_beyond_the_vocabulary_are_refused_with_their_place(here: Path) -> None:
    documents = [[1, 2, 3], [], [4, 5, 300, 7], list(range(60))]
    make_index(here / "c", documents, dtype=np.int32)
    refuses_in_one_line(
        "token 2 of document 2 is id 300, beyond the vocabulary of 257 ids", tokenizer="bytes"
    )
    make_index(here / "c", [[1], [2, -3, *range(60)]], dtype=np.int32)
    refuses_in_one_line("token 1 of document 1 is id -3, beyond the vocabulary of 257 ids", tokenizer="bytes")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version"'], ids=["empty", "other", "cut"])
def test_a_tokenizer_that_cannot_be_read_is_refused_before_the_start(
    here: Path, bpe_file: str, content: bytes
) -> None:
    make_corpus(here / "c", [words(number) for number in range(9)], tokenizer=bpe_file)
    check_data(config())
    (here / "c.tokenizer" / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"^corpus=c: tokenizer: .*cannot be read") as told:
        check_data(config())
    assert "\n" not in str(told.value)


def test_another_tokenizer_with_the_corpus_is_refused_before_the_start(here: Path, bpe_file: str) -> None:
    make_corpus(here / "c", [words(number) for number in range(9)], tokenizer=bpe_file)
    make_corpus(here / "d", ["a"])
    shutil.rmtree("c.tokenizer")
    shutil.copytree("d.tokenizer", "c.tokenizer")
    with pytest.raises(DataError, match="is not the one that the manifest names"):
        check_data(config())
    check_data(config(tokenizer=bpe_file))


def test_a_manifest_of_a_later_format_says_so(prefix: Path) -> None:
    facts = json.loads(Path("c.json").read_text())
    Path("c.json").write_text(json.dumps({**facts, "format": 3}))
    with pytest.raises(DataError, match="has format 3, known are 1 and 2: it is of a newer Megaloom"):
        check_data(config())


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    reads: list[str] = []
    real: Callable = corpus_check.read_blocks
    monkeypatch.setattr(
        corpus_check, "read_blocks", lambda path, *more: (reads.append(path.name), real(path, *more))[1]
    )
    return reads
