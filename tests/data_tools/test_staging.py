import multiprocessing
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.staging import Staging, write_whole


def fill(staging: Staging, text: str) -> None:
    for suffix in (".bin", ".idx", ".json"):
        staging.path(suffix).write_text(text)
    staging.path(".tokenizer").mkdir()
    (staging.path(".tokenizer") / "t").write_text(text)


def test_nothing_appears_before_publish_and_everything_after(tmp_path: Path) -> None:
    prefix = tmp_path / "deep" / "c"
    with Staging(prefix) as staging:
        fill(staging, "1")
        assert [path.name for path in prefix.parent.iterdir()] == ["c.partial"]
        staging.publish()
    assert sorted(path.name for path in prefix.parent.iterdir()) == [
        "c.bin",
        "c.idx",
        "c.json",
        "c.tokenizer",
    ]


def test_publishing_replaces_an_older_corpus_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with Staging(tmp_path / "c") as staging:
            fill(staging, text)
            staging.publish()
    assert (tmp_path / "c.idx").read_text() == (tmp_path / "c.tokenizer" / "t").read_text() == "new"


def test_the_index_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    monkeypatch.setattr(
        "data_tools.staging.os.rename", lambda source, target: moved.append(Path(target).name)
    )
    with Staging(tmp_path / "c") as staging:
        fill(staging, "1")
        staging.publish()
    assert moved == ["c.bin", "c.json", "c.tokenizer", "c.idx"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Staging(tmp_path / "c") as staging:
        fill(staging, "1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_cleaned(tmp_path: Path) -> None:
    (tmp_path / "c.partial" / "old.tokenizer").mkdir(parents=True)
    (tmp_path / "c.partial" / "c.bin").write_text("half")
    with Staging(tmp_path / "c") as staging:
        assert [path.name for path in staging.folder.iterdir()] == ["lock"]


def test_two_writers_of_one_corpus_are_refused(tmp_path: Path) -> None:
    with Staging(tmp_path / "c"):
        process = multiprocessing.get_context("spawn").Process(target=_try_to_stage, args=(tmp_path / "c",))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert (tmp_path / "c.partial").exists(), "the refused writer must not clean up after the first"


def _try_to_stage(prefix: Path) -> None:
    with pytest.raises(DataError, match="is being written by another process"), Staging(prefix):
        pass


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"), Staging(tmp_path / "file" / "c"):
        pass


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder/", r"out=folder/ is a folder: name a corpus in it, such as folder/corpus"),
        (".", "is a folder"),
        ("..", "is a folder"),
        ("c.bin", r"out=c\.bin is a file: leave \.bin out"),
        ("c.idx", r"leave \.idx out"),
    ],
)
def test_a_name_that_cannot_be_a_corpus_is_told(here: Path, name: str, words: str) -> None:
    with pytest.raises(DataError, match=words), Staging(name):
        pass
    assert list(here.iterdir()) == []


def test_write_whole_leaves_the_old_file_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write_whole(path, b"old")

    def full_disk(stream: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("data_tools.staging.sync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["f"]
