"""Inputs of every kind, through `find_sources` and `read_tasks` to documents."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data_tools.corpora import find_sources, read_tasks
from data_tools.documents import Documents, read_documents
from data_tools.errors import DataError
from data_tools.readers.source import BLOCK_BYTES, ReadOptions, TxtDocuments
from tests.data_tools.making import REPOSITORY, words, write_jsonl

TEXTS = ["first", "zweiter ☕", "third\nwith a line"]


def read(*inputs: Path | str, options: ReadOptions = ReadOptions()) -> Documents:  # noqa: B008 (frozen)
    all_found = Documents()
    for task in read_tasks(find_sources([str(word) for word in inputs]), options):
        found = read_documents(task, text_field=options.text_field)
        all_found.texts += found.texts
        all_found.places += found.places
        all_found.skips.merge(found.skips)
    return all_found


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, **columns: list[str] | list[int]) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_every_kind_of_json_lines_and_parquet_gives_the_same_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[:1])) + gzip.compress(lines(TEXTS[1:])))
    frames = zstandard.compress(lines(TEXTS[:1])) + zstandard.compress(lines(TEXTS[1:]))
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    write_parquet(tmp_path / "a.parquet", text=TEXTS, id=[1, 2, 3])
    for path in tmp_path.iterdir():
        assert read(path).texts == TEXTS, path.name


def test_a_txt_file_is_one_document_or_its_lines_or_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n\nthree\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    for source in (path, tmp_path / "a.txt.gz"):
        assert read(source).texts == ["one\ntwo\n\nthree\n"]
        assert read(source, options=ReadOptions(txt_documents=TxtDocuments.LINE)).texts == [
            "one",
            "two",
            "three",
        ]
        by_paragraph = read(source, options=ReadOptions(txt_documents=TxtDocuments.PARAGRAPH))
        assert by_paragraph.texts == ["one\ntwo", "three"]


@pytest.mark.parametrize("kind", [TxtDocuments.LINE, TxtDocuments.PARAGRAPH])
def test_blocks_are_cut_between_documents_and_lines_keep_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: TxtDocuments
) -> None:
    path = tmp_path / "a.txt"
    texts = [
        words(number, count=1 + number % 5).replace(" ", "\n" if kind == "paragraph" else " ")
        for number in range(60)
    ]
    path.write_text("\n\n".join(texts))
    whole = read(path, options=ReadOptions(txt_documents=kind))
    assert whole.texts == texts
    for block_bytes in (1, 7, 64):
        monkeypatch.setattr("data_tools.readers.plain.BLOCK_BYTES", block_bytes)
        cut = read(path, options=ReadOptions(txt_documents=kind))
        assert (cut.texts, cut.places) == (whole.texts, whole.places)


def test_a_folder_is_read_recursively_and_sorted_without_hidden_or_unknown_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.txt", "c.pdf", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path).texts == ["a.txt", "b/1.txt", "b/2.txt"]


def test_a_field_is_selectable(tmp_path: Path) -> None:
    options = ReadOptions(text_field="content")
    assert read(write_jsonl(tmp_path / "a.jsonl", ["x"], field="content"), options=options).texts == ["x"]
    assert read(write_parquet(tmp_path / "a.parquet", content=["x"]), options=options).texts == ["x"]


def test_the_standard_library_is_read_in_a_fixed_order() -> None:
    sources = find_sources(["stdlib"])
    names = [source.name for source in sources]
    assert sources == find_sources(["stdlib"])
    assert any(name.endswith("json/decoder.py") for name in names)
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert len(sources) > 300 and all(source.num_bytes for source in sources)


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]}).save_to_disk(tmp_path / "saved")
    found = read(tmp_path / "saved")
    assert found.texts == TEXTS
    assert found.places[2] == (str(tmp_path / "saved"), 3)


def test_a_dataset_is_loaded_by_name_and_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", TEXTS)
    assert read(f"hf:{tmp_path}:train").texts == TEXTS
    assert read(f"hf:{tmp_path}:default:train").texts == TEXTS


def test_files_that_cannot_be_read_are_left_out_with_their_reason(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines([words(n) for n in range(99)]))[:-20])
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.compress(lines([words(n) for n in range(99)]))[:-20])
    (tmp_path / "junk.jsonl.gz").write_bytes(b"junk")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    write_parquet(tmp_path / "other.parquet", content=["a", "b"])
    found = read(tmp_path)
    assert "good" in found.texts
    assert found.skips.by_reason() == {"empty": 2, "missing field": 2, "unreadable": 4}
    assert "fetch it again" in str(found.skips.examples["unreadable"])
    assert "fields there: content" in str(found.skips.examples["missing field"])


def test_a_dataset_without_the_field_is_left_out_whole(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"content": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved").skips.by_reason() == {"missing field": 2}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "input=nowhere does not exist: give .txt, .jsonl"),
        ("a.pdf", "no reader for '.pdf'"),
        ("noname", "no reader for 'a file without suffix'"),
        ("a.parquet.gz", "no reader for '.gz'"),
        ("pdfs", r"pdfs has no file that can be read \(1 of other kinds\)"),
        ("splits", "saved dataset with several splits: name one of splits/test, splits/train"),
        ("hf:name", "write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"),
        ("hf:nobody/nothing:train", "cannot be loaded"),
    ],
)
def test_an_input_that_cannot_be_meant_is_told_in_one_line(here: Path, name: str, words: str) -> None:
    for file in ("a.pdf", "noname", "a.parquet.gz", "pdfs/a.pdf", "splits/dataset_dict.json"):
        (here / file).parent.mkdir(exist_ok=True)
        (here / file).write_text("")
    for split in ("train", "test"):
        (here / "splits" / split).mkdir()
    with pytest.raises(DataError, match=words) as told:
        read(name)
    assert "\n" not in str(told.value)


def test_no_input_is_told() -> None:
    with pytest.raises(DataError, match="inputs are missing"):
        find_sources([])


def test_a_file_that_vanishes_is_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    sources = find_sources([str(path)])
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        list(read_tasks(sources, ReadOptions()))


def test_tasks_are_of_a_size_and_join_small_files(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text("x" * (BLOCK_BYTES // 8))
    assert [len(task) for task in read_tasks(find_sources([str(tmp_path)]), ReadOptions())] == [8, 8, 4]


def test_plain_text_needs_neither_torch_nor_the_optional_readers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    program = (
        "import sys; from data_tools import prepare, corpus_commands, tokenizer_training, training_data\n"
        "recipe = prepare.Recipe((sys.argv[1],), 'bytes')\n"
        "prepare.prepare(recipe, sys.argv[1] + '/c', num_workers=0)\n"
        "sys.exit(' '.join({'torch', 'datasets', 'pyarrow', 'zstandard'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=REPOSITORY)
