"""Bytes per token add up to the text's, whatever a sample's edges cut."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_tools.tokenizer import ByteTokenizer, PieceTokenizer, load_tokenizer
from data_tools.tokenizer_training import train_tokenizer

TEXT = "the λόγος 知道 of things\n\tand  “of” words 🙂"


@given(text=st.text(max_size=40))
def test_a_byte_is_a_token(text: str) -> None:
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes()[tokenizer.end_of_document] == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trained") / "t.json"
    train_tokenizer([TEXT] * 3, vocab_size=290).save(str(path))
    return str(path)


@given(text=st.text(max_size=40))
def test_byte_level_pieces_are_counted_exactly(trained: str, text: str) -> None:
    tokenizer = load_tokenizer(trained)
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_ends_and_marks_are_no_text_but_added_text_is(trained: str) -> None:
    pieces = Tokenizer.from_file(trained)
    pieces.add_special_tokens([AddedToken("<mark>", special=True)])
    pieces.add_tokens([AddedToken("    é", normalized=False)])
    tokenizer = PieceTokenizer(pieces, end_token=None, spec="t")
    counts = tokenizer.token_bytes()
    assert counts[tokenizer.end_of_document] == counts[tokenizer.id_of("<mark>") or 0] == 0
    (ids,) = tokenizer.encode_batch(["of    é words"])
    assert counts[ids].sum() == len("of    é words".encode())


def test_sentencepieces_spaces_and_bytes_are_one(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "▁the": 2, "▁λ": 3, "<0xE2>": 4, "ing": 5, "▁": 6}
    pieces = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert PieceTokenizer(pieces, end_token=None, spec="t").token_bytes().tolist() == [0, 0, 4, 3, 1, 3, 1]
    unigram = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("bc", -2.0), ("</s>", -3.0)], unk_id=0)
    )
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert PieceTokenizer(unigram, end_token=None, spec="t").token_bytes().tolist() == [0, 2, 2, 0]


def test_word_pieces_have_a_space_before_each_word(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n[SEP]\nthe\n##ing\nwörd\n")
    tokenizer = load_tokenizer(str(tmp_path / "vocab.txt"))
    assert tokenizer.token_bytes().tolist() == [0, 0, 4, 3, 6]


def test_a_words_last_piece_has_a_space_after_it() -> None:
    pieces = Tokenizer(models.BPE({"<unk>": 0, "the</w>": 1, "th": 2}, [], end_of_word_suffix="</w>"))
    pieces.normalizer, pieces.decoder = normalizers.Lowercase(), decoders.BPEDecoder("</w>")
    assert PieceTokenizer(pieces, end_token=None, spec="t").token_bytes().tolist()[1:] == [4, 2]
