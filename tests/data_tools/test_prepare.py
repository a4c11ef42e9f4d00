import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from data_tools import prepare as module
from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.indexed import IndexedReader
from data_tools.manifest import load_manifest
from data_tools.prepare import Recipe, main, prepare
from data_tools.readers.source import ReadOptions, TxtDocuments
from tests.data_tools.making import make_corpus, make_index, words, write_jsonl

SUFFIXES = (".bin", ".idx", ".json")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def files(prefix: Path | str) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]


def test_documents_come_out_as_they_went_in_each_with_its_end(tmp_path: Path, bpe_file: str) -> None:
    texts = [words(number) for number in range(5)]
    for name, tokenizer in (("bytes", "bytes"), ("bpe", bpe_file)):
        make_corpus(tmp_path / name, texts, tokenizer=tokenizer)
        corpus = Corpus(tmp_path / name)
        saved = corpus.tokenizer()
        for number, text in enumerate(texts):
            tokens = corpus.index.document(number)
            assert tokens[-1] == saved.end_of_document
            assert saved.decode(tokens[:-1]) == text


def test_without_end_tokens_documents_are_their_text_only(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["ab", "c"])
    manifest = prepare(
        Recipe((str(source),), "bytes", append_end=False), str(tmp_path / "c"), num_workers=0
    ).manifest
    assert IndexedReader(tmp_path / "c").tokens.tolist() == [*b"abc"]
    assert manifest.tokenizer.end_of_document is None


def test_one_and_three_workers_write_the_same_bytes_as_none(
    tmp_path: Path, bpe_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("corpora", "readers.plain"):
        monkeypatch.setattr(f"data_tools.{place}.BLOCK_BYTES", 10_000)
    source = write_jsonl(tmp_path / "in.jsonl", [words(number, count=40) for number in range(600)])
    for workers in (0, 1, 3):
        prepare(Recipe((str(source),), bpe_file), str(tmp_path / f"w{workers}"), num_workers=workers)
    assert files(tmp_path / "w0") == files(tmp_path / "w1") == files(tmp_path / "w3")


def test_the_manifest_says_where_everything_came_from(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", ["ab", "", "cde"])
    (tmp_path / "b.txt").write_bytes(b"\xff")
    recipe = Recipe((str(good), str(tmp_path / "b.txt")), "bytes")
    manifest = prepare(recipe, str(tmp_path / "c"), num_workers=0).manifest
    assert manifest == load_manifest(tmp_path / "c")
    assert (manifest.documents, manifest.tokens, manifest.text_bytes, manifest.dtype) == (2, 7, 5, "uint16")
    assert manifest.skipped == {"empty": 1, "not UTF-8": 1}
    assert [record.bytes for record in manifest.inputs] == [good.stat().st_size, 1]
    assert manifest.inputs[1].sha256 == "a8100ae6aa1940d0b663bb31cd466142ebbdbd5187131b92d93818987832eb89"
    assert manifest.options == {"field": "text", "txt_documents": "file", "end_of_document": True}


def test_a_set_of_files_is_recorded_as_one(tmp_path: Path) -> None:
    manifest = prepare(Recipe(("stdlib",), "bytes"), str(tmp_path / "c"), num_workers=0).manifest
    assert [(record.path, record.files) for record in manifest.inputs] == [("stdlib", manifest.documents)]


def test_running_it_twice_does_the_work_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_corpus(tmp_path / "c", ["a", "b"])
    monkeypatch.setattr(module, "encode_tasks", None)  # would fail if called
    again = make_corpus(tmp_path / "c", ["a", "b"])
    assert (first.was_there, again.was_there) == (False, True)
    assert again.manifest == first.manifest


@pytest.mark.parametrize("change", ["text", "length", "tokenizer", "options", "end"])
def test_another_corpus_is_kept_unless_forced(tmp_path: Path, bpe_file: str, change: str) -> None:
    source = str(write_jsonl(tmp_path / "in.jsonl", ["aa", "b"]))
    out = str(tmp_path / "c")
    prepare(Recipe((source,), "bytes"), out, num_workers=0)
    before = files(out)
    write_jsonl(tmp_path / "in.jsonl", {"text": ["ab", "b"], "length": ["aaa"]}.get(change, ["aa", "b"]))
    recipe = Recipe(
        (source,),
        bpe_file if change == "tokenizer" else "bytes",
        ReadOptions(txt_documents=TxtDocuments.LINE if change == "options" else TxtDocuments.FILE),
        append_end=change != "end",
    )
    with pytest.raises(
        DataError, match=r"holds another corpus \(made .*choose another --out, or replace it by --force"
    ):
        prepare(recipe, out, num_workers=0)
    assert files(out) == before
    assert not prepare(recipe, out, num_workers=0, force=True).was_there


def test_a_corpus_of_another_origin_is_kept(tmp_path: Path) -> None:
    make_index(tmp_path / "c", [[1]])
    with pytest.raises(DataError, match="it was not written by megaloom"):
        make_corpus(tmp_path / "c", ["a"])


def test_a_damaged_corpus_is_not_called_prepared(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", ["a", "b"])
    (tmp_path / "c.bin").write_bytes(b"")
    with pytest.raises(DataError, match="a copy was cut short"):
        make_corpus(tmp_path / "c", ["a", "b"])


def test_a_saved_dataset_is_prepared_once(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    recipe = Recipe((str(tmp_path / "saved"),), "bytes")
    assert prepare(recipe, str(tmp_path / "c"), num_workers=0).manifest.tokens == 4
    assert prepare(recipe, str(tmp_path / "c"), num_workers=0).was_there
    datasets.Dataset.from_dict({"text": ["a", "c"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="made of other inputs"):
        prepare(recipe, str(tmp_path / "c"), num_workers=0)


def test_when_nothing_is_left_no_corpus_appears(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a"], field="content")
    with pytest.raises(DataError, match=r"fields there: content.*--field NAME"):
        prepare(Recipe((str(source),), "bytes"), str(tmp_path / "c"), num_workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_stops_at_the_first_bad_record_and_leaves_nothing(tmp_path: Path, workers: int) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": \n')
    recipe = Recipe((str(tmp_path / "in.jsonl"),), "bytes", strict=True)
    with pytest.raises(DataError, match=r"in\.jsonl:2: broken JSON"):
        prepare(recipe, str(tmp_path / "c"), num_workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_document_that_becomes_no_tokens_is_left_out(tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[UNK]\n[SEP]\na\n")
    manifest = make_corpus(tmp_path / "c", ["a", "\u200d"], tokenizer=str(vocab)).manifest
    assert (manifest.tokens, manifest.skipped) == (2, {"no tokens": 1})


def test_small_inputs_are_not_worth_a_worker(tmp_path: Path) -> None:
    sources = module.find_sources([str(write_jsonl(tmp_path / "in.jsonl", ["a"]))])
    assert module._num_workers(None, sources) == 0
    assert module._num_workers(5, sources) == 5
    unknown = module.Source("hf:a:train", "hub")
    assert module._num_workers(None, [unknown]) >= 1


def test_the_command_prints_counts_reasons_and_what_comes_next(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "in.jsonl").write_text('{"text": "hello"}\n{\n')
    assert run("in.jsonl", "--tokenizer", "bytes", "--out", "c") == 0
    told = capsys.readouterr().out
    assert "documents   1\n" in told
    assert "tokens      6 (uint16, 0.83 bytes of text per token)" in told
    assert "left out    1 record (1 broken JSON)" in told
    assert "broken JSON in 1 record, first in.jsonl:2 (Expecting property name" in told
    assert "note: 1 document: the train/valid/test split goes by documents" in told
    assert "next        megaloom data inspect c" in told
    assert run("in.jsonl", "--tokenizer", "bytes", "--out", "c") == 0
    assert "already prepared: c holds exactly this corpus" in capsys.readouterr().out


def test_every_option_reaches_the_recipe(here: Path) -> None:
    (here / "in.txt").write_text("one\ntwo\n")
    (here / "t.json").write_text(json.dumps(_word_tokenizer()))
    options = ["--tokenizer", "t.json", "--txt-documents", "line", "--workers", "0", "--strict", "--force"]
    assert run("in.txt", "--out", "c", *options, "--eod", "two") == 0
    assert IndexedReader("c").tokens.tolist() == [0, 1, 1, 1]
    assert run("in.txt", "--out", "c", *options, "--no-eod") == 0
    assert IndexedReader("c").tokens.tolist() == [0, 1]
    (here / "in.jsonl").write_text('{"body": "one"}')
    assert run("in.jsonl", "--out", "d", "--tokenizer", "t.json", "--field", "body", "--no-eod") == 0
    assert np.array_equal(IndexedReader("d").tokens, [0])


def test_ctrl_c_says_that_nothing_was_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    (here / "in.txt").write_text("a")
    monkeypatch.setattr(module, "encode_tasks", interrupted)
    assert run("in.txt", "--tokenizer", "bytes", "--out", "c") == 130
    assert "interrupted: no corpus was written to c; run the same command" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["in.txt"]


def _word_tokenizer() -> dict[str, object]:
    model = {"type": "WordLevel", "vocab": {"one": 0, "two": 1}, "unk_token": "two"}
    return {"version": "1.0", "added_tokens": [], "model": model}
