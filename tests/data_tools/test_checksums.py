import hashlib
from pathlib import Path

import datasets
import pytest

from data_tools.checksums import Checksums
from data_tools.corpora import find_sources
from data_tools.readers.source import Source
from tests.data_tools.making import write_jsonl


def records(*inputs: Path | str) -> list[tuple[str, int, str, int]]:
    with Checksums(find_sources([str(word) for word in inputs])) as checksums:
        return [(Path(r.path).name, r.bytes, r.sha256, r.files) for r in checksums.records()]


def test_each_file_has_the_sum_that_sha256sum_gives(tmp_path: Path) -> None:
    data = [write_jsonl(tmp_path / f"{name}.jsonl", [name]).read_bytes() for name in "ab"]
    expected = [
        (f"{n}.jsonl", len(d), hashlib.sha256(d).hexdigest(), 1) for n, d in zip("ab", data, strict=True)
    ]
    assert records(tmp_path) == expected


def test_a_group_is_one_record_that_follows_its_files(tmp_path: Path) -> None:
    def of_group() -> tuple[str, int]:
        sources = [Source(str(path), "plain", group="set") for path in sorted(tmp_path.iterdir())]
        with Checksums(sources) as checksums:
            (record,) = checksums.records()
        return record.sha256, record.files

    for name in "ab":
        (tmp_path / name).write_text(name)
    before = of_group()
    assert before[1] == 2 and of_group() == before
    (tmp_path / "b").write_text("c")
    assert of_group() != before


def test_a_dataset_is_known_by_its_rows_on_disk(tmp_path: Path) -> None:
    for name, text in (("one", "a"), ("two", "b")):
        datasets.Dataset.from_dict({"text": [text]}).save_to_disk(tmp_path / name)
    (one,), (two,) = records(tmp_path / "one"), records(tmp_path / "two")
    assert one[1] > 0 and one[2] != two[2]


def test_leaving_early_does_not_wait_for_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.checksums.PIECE_BYTES", 1)
    (tmp_path / "a.txt").write_bytes(b"x" * 3_000_000)  # seconds at one byte a time
    with pytest.raises(KeyboardInterrupt), Checksums(find_sources([str(tmp_path)])) as checksums:
        raise KeyboardInterrupt
    assert checksums.records()[0].bytes < 3_000_000
