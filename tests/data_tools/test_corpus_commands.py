from pathlib import Path

import pytest

from data_tools import corpus_commands
from data_tools.corpus_commands import main
from tests.data_tools.making import make_corpus, make_index


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def test_inspect_shows_counts_lengths_and_chosen_documents(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_corpus(here / "c", ["first", "second", "third"])
    assert run("inspect", "c", "--document", "1", "--document", "2") == 0
    told = capsys.readouterr().out
    assert "documents   3" in told and "█" in told
    assert "--- document 1, 7 tokens\nsecond" in told and "third" in told and "first" not in told
    assert run("inspect", "c.bin", "--first", "2", "--chars", "3") == 0
    assert "fir ... (the first 3 characters)" in capsys.readouterr().out


def test_inspect_without_documents_needs_no_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_index(here / "c", [[104, 105]])
    assert run("inspect", "c", "--first", "0") == 0
    assert "---" not in capsys.readouterr().out
    assert run("inspect", "c", "--tokenizer", "bytes") == 0
    assert "hi" in capsys.readouterr().out


def test_merge_prints_the_sum(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_corpus(here / "a", ["x"])
    make_corpus(here / "b", ["y"])
    assert run("merge", "a", "b", "--out", "c") == 0
    assert "documents   2" in capsys.readouterr().out
    for name in ("d", "e"):
        make_index(here / name, [[1, 2]])
    assert run("merge", "d", "e", "--out", "f") == 0
    assert "merged 2 corpora without manifests into f: 4 tokens" in capsys.readouterr().out


def test_verify_exits_with_1_and_a_line_per_fault_or_0_and_ok(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_corpus(here / "good", ["x"])
    make_corpus(here / "bad", ["x"])
    (here / "bad.bin").write_bytes(b"\0\0\0\0")
    assert run("verify", "good") == 0
    assert capsys.readouterr().out == "good: ok\n"
    assert run("verify", "good", "bad", "nowhere") == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "good: ok"
    assert [line.split(":")[0] for line in told[1:]] == ["bad", "bad", "nowhere"]


def test_ctrl_c_during_a_merge_says_that_nothing_was_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_commands.merging, "merge", interrupted)
    assert run("merge", "a", "b", "--out", "c") == 130
    assert "interrupted: no corpus was written to c" in capsys.readouterr().err
