import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, processors

from data_tools.errors import DataError
from data_tools.tokenizer import load_tokenizer
from tests.data_tools.making import words

TEXTS = ["word1x2 and word3", "naïve café ☕", " leading", "a\n\nb\t"]


@pytest.fixture
def gpt2_pair(tmp_path: Path, bpe_file: str) -> tuple[Path, Path]:
    tokenizers.Tokenizer.from_file(bpe_file).model.save(str(tmp_path))
    return tmp_path / "vocab.json", tmp_path / "merges.txt"


@pytest.fixture
def bert_vocab(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "world", "##s", "cafe", "[", "]", "sep"])
    )
    return path


def ids(spec: str, text: str) -> list[int]:
    return load_tokenizer(spec).encode_batch([text])[0].tolist()


def test_bytes_round_trip_and_end_with_256() -> None:
    tokenizer = load_tokenizer("bytes")
    for text, encoded in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert encoded.tolist() == list(text.encode())
        assert tokenizer.decode(np.append(encoded.astype(np.uint16), 256)) == text
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)


def test_byte_level_bpe_round_trips(bpe_file: str) -> None:
    tokenizer = load_tokenizer(bpe_file)
    for text, encoded in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(encoded) == text


def test_all_layouts_of_one_bpe_are_one_tokenizer(bpe_file: str, gpt2_pair: tuple[Path, Path]) -> None:
    vocab, merges = gpt2_pair
    specs = [bpe_file, f"{vocab},{merges}", f"{merges},{vocab}", str(vocab.parent)]
    loaded = [load_tokenizer(spec) for spec in specs]
    assert len({tokenizer.fingerprint for tokenizer in loaded}) == 1
    assert len({tuple(tokenizer.encode_batch([words(3)])[0]) for tokenizer in loaded}) == 1


@pytest.mark.parametrize("end_token", [None, "word"])
def test_a_saved_tokenizer_loads_as_itself(tmp_path: Path, bpe_file: str, end_token: str | None) -> None:
    for spec in (bpe_file, "bytes"):
        before = load_tokenizer(spec, end_token=end_token if spec == bpe_file else None)
        before.save(tmp_path / spec.replace("/", "_"))
        after = load_tokenizer(str(tmp_path / spec.replace("/", "_")))
        assert after.fingerprint == before.fingerprint
        assert after.end_of_document == before.end_of_document
        assert after.encode_batch(TEXTS)[1].tolist() == before.encode_batch(TEXTS)[1].tolist()


def test_truncation_and_padding_of_a_file_are_switched_off(tmp_path: Path, bpe_file: str) -> None:
    pieces = tokenizers.Tokenizer.from_file(bpe_file)
    pieces.enable_truncation(4)
    pieces.enable_padding(length=4)
    pieces.save(str(tmp_path / "cut.json"))
    assert ids(str(tmp_path / "cut.json"), words(1)) == ids(bpe_file, words(1))
    assert ids(str(tmp_path / "cut.json"), "a") == ids(bpe_file, "a")


def test_no_special_tokens_are_added(tmp_path: Path, bpe_file: str) -> None:
    pieces = tokenizers.Tokenizer.from_file(bpe_file)
    pieces.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    pieces.save(str(tmp_path / "adds.json"))
    assert ids(str(tmp_path / "adds.json"), "word") == ids(bpe_file, "word")


def test_an_end_token_spelled_in_a_document_is_text(bpe_file: str) -> None:
    tokenizer = load_tokenizer(bpe_file)
    encoded = tokenizer.encode_batch(["a<|endoftext|>b"])[0]
    assert tokenizer.end_of_document not in encoded
    assert tokenizer.decode(encoded) == "a<|endoftext|>b"


def test_the_end_token_is_found_by_its_usual_names(tmp_path: Path, bert_vocab: Path) -> None:
    assert load_tokenizer(str(bert_vocab)).end_of_document == 3  # [SEP]
    for name in ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"):
        path = _bare_bpe(tmp_path, {"a": 0, name: 7})
        tokenizer = load_tokenizer(path)
        assert (tokenizer.end_of_document, tokenizer.vocab_size) == (7, 8)


def test_settings_in_the_folder_name_the_end_token(tmp_path: Path) -> None:
    _bare_bpe(tmp_path, {"a": 0, "</s>": 1, "[END]": 2})
    for value in ("[END]", {"content": "[END]"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        assert load_tokenizer(str(tmp_path)).end_of_document == 2


def test_a_tokenizer_without_an_end_token_says_so_when_asked(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_bare_bpe(tmp_path, {"a": 0}))
    assert tokenizer.encode_batch(["a"])[0].tolist() == [0]
    with pytest.raises(DataError, match=r"has no end-of-document token .*name one with --eod TOKEN"):
        _ = tokenizer.end_of_document


def test_a_misspelt_end_token_is_told_at_once(bpe_file: str) -> None:
    with pytest.raises(DataError, match="looked for <eot>"):
        load_tokenizer(bpe_file, end_token="<eot>")
    with pytest.raises(DataError, match="tokenizer=bytes ends documents with id 256"):
        load_tokenizer("bytes", end_token="<eot>")


def test_a_bert_vocabulary_lower_cases_unless_it_has_capitals_or_settings_say_so(bert_vocab: Path) -> None:
    assert ids(str(bert_vocab), "Hello WORLDS Café [SEP]") == [4, 5, 6, 7, 8, 10, 9]
    (bert_vocab.parent / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert ids(str(bert_vocab), "hello Hello") == [4, 1]
    (bert_vocab.parent / "tokenizer_config.json").unlink()
    bert_vocab.write_text(bert_vocab.read_text() + "\nHello")
    assert ids(str(bert_vocab), "hello Hello") == [4, 11]


def test_fingerprints_tell_vocabularies_apart(tmp_path: Path, bpe_file: str) -> None:
    other = _bare_bpe(tmp_path, {"a": 0, "b": 1})
    again = load_tokenizer(other).fingerprint
    assert load_tokenizer(_bare_bpe(tmp_path, {"a": 1, "b": 0})).fingerprint != again
    assert load_tokenizer(bpe_file).fingerprint != load_tokenizer("bytes").fingerprint


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.json", "no such file; give bytes, a tokenizer JSON"),
        ("a/b/c", "no such file"),
        ("nobody/nothing", "the Hugging Face hub did not give it"),
        ("vocab.json,vocab.json", "a pair is one vocab.json and one merges.txt"),
        ("vocab.json,merges.txt", "no such file vocab.json"),
        ("empty", "holds none of tokenizer.json"),
        ("sentencepiece", "becomes a tokenizer.json by transformers' save_pretrained"),
        ("broken.json", "cannot be read"),
        ("poem.txt", "is no BERT vocabulary"),
        ("settings", "are broken JSON"),
    ],
)
def test_a_bad_spec_is_told_in_one_line(here: Path, spec: str, words: str) -> None:
    for folder in ("empty", "sentencepiece", "settings"):
        (here / folder).mkdir()
    (here / "sentencepiece" / "tokenizer.model").write_text("")
    (here / "settings" / "tokenizer_config.json").write_text("{")
    (here / "broken.json").write_text("{}")
    (here / "poem.txt").write_text("roses\nare\nred\n")
    with pytest.raises(DataError, match=words) as told:
        load_tokenizer(spec)
    assert "\n" not in str(told.value)


def _bare_bpe(folder: Path, vocabulary: dict[str, int]) -> str:
    path = folder / "tokenizer.json"
    tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(path))
    return str(path)
