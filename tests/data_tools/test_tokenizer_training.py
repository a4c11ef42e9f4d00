import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tokenizers

from data_tools.errors import DataError
from data_tools.tokenizer import load_tokenizer
from data_tools.tokenizer_training import interruptible, main, train_tokenizer
from tests.data_tools.making import REPOSITORY, words, write_jsonl


def test_the_end_token_is_id_0_and_every_byte_is_known(bpe_file: str) -> None:
    pieces = tokenizers.Tokenizer.from_file(bpe_file)
    assert pieces.token_to_id("<|endoftext|>") == 0
    assert pieces.get_vocab_size() == 300
    text = "".join(map(chr, range(1, 0x250))) + "漢字🦥"
    assert load_tokenizer(bpe_file).decode(load_tokenizer(bpe_file).encode_batch([text])[0]) == text


def test_the_same_text_gives_the_same_file_in_any_process(here: Path) -> None:
    source = write_jsonl(here / "in.jsonl", [words(number) for number in range(200)])
    for out in ("one.json", "two.json"):
        program = "import sys; from data_tools.tokenizer_training import main; main(sys.argv[1:])"
        command = [sys.executable, "-c", program, str(source), "--vocab-size", "290", "--out", out]
        subprocess.run(command, check=True, capture_output=True, env=_with_other_hashes(out))
    assert (here / "one.json").read_bytes() == (here / "two.json").read_bytes()


def test_the_command_tells_what_it_did_and_what_comes_next(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(here / "in.jsonl", ["ab ab ab", ""])
    _run(str(source), "--vocab-size", "5000", "--out", "t.json")
    told = capsys.readouterr().out
    assert "on 1 documents" in told
    assert "not 5,000: give more text or ask for fewer" in told
    assert "left out: empty in 1 record, first in.jsonl:2; remove it" in told.replace(f"{here}/", "")
    assert "megaloom prepare INPUT... --tokenizer t.json" in told


def test_a_limit_stops_reading(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_jsonl(here / f"{name}.jsonl", [name * 2_000_000])
    _run("a.jsonl", "b.jsonl", "--vocab-size", "260", "--out", "t.json", "--limit-mb", "1")
    assert "on 1 documents, 2.0 MB" in capsys.readouterr().out


def test_another_tokenizer_is_not_overwritten_unless_forced(here: Path) -> None:
    write_jsonl(here / "in.jsonl", [words(1)])
    words_of = ["in.jsonl", "--out", "t.json", "--vocab-size"]
    _run(*words_of, "258")
    _run(*words_of, "258")  # the same again is no harm
    with pytest.raises(DataError, match=r"out=t\.json holds another tokenizer"):
        _run(*words_of, "265")
    _run(*words_of, "265", "--force")


def test_mistakes_are_told_in_words(here: Path) -> None:
    write_jsonl(here / "in.jsonl", [words(1)], field="content")
    with pytest.raises(DataError, match=r"vocab-size=256 is below 257"):
        train_tokenizer(iter(["a"]), vocab_size=256)
    with pytest.raises(DataError, match="fields there: content"):
        _run("in.jsonl", "--vocab-size", "300", "--out", "t.json")
    with pytest.raises(DataError, match="strict stops here"):
        _run("in.jsonl", "--vocab-size", "300", "--out", "t.json", "--strict")
    with pytest.raises(DataError, match="cannot be written"):
        _run("in.jsonl", "--field", "content", "--vocab-size", "300", "--out", "in.jsonl/t.json")


def test_ctrl_c_says_that_nothing_was_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    write_jsonl(here / "in.jsonl", [words(1)])
    monkeypatch.setattr("data_tools.tokenizer_training.train_tokenizer", interrupted)
    with pytest.raises(SystemExit) as left:
        main(["in.jsonl", "--vocab-size", "300", "--out", "t.json"])
    assert left.value.code == 130
    assert "interrupted: t.json was not written" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_work_in_native_code_can_be_interrupted() -> None:
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: time.sleep(1000))
    assert interruptible(lambda: 3) == 3
    with pytest.raises(DataError, match="is below 257"):
        interruptible(lambda: train_tokenizer(["a"], vocab_size=1))


@pytest.mark.timeout(60)
def test_a_run_of_a_million_letters_does_not_stall_training() -> None:
    text = "a" * 1_000_000 + "\n" + " " * 1_000_000
    assert train_tokenizer([text, words(1)], vocab_size=290).get_vocab_size() > 257


def _run(*words: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    assert left.value.code == 0


def _with_other_hashes(name: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": REPOSITORY, "PYTHONHASHSEED": str(ord(name[0]))}
