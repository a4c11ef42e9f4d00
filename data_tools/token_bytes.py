"""How many bytes of text each id of a vocabulary stands for, for losses per byte.

Exact: byte-level BPE (a character of a piece is a byte) and plain bytes, whatever the text, since a token's bytes do
not depend on its neighbours.  Approximate, and how:

* pieces of SentencePiece's kind ("▁the"): "▁" is one space, also that which is put before a document (1 byte each);
* WordPiece: a word has one space before it ("the": 4 bytes, "##ing": 3), which the text of punctuation does not, and
  white space and capitals that the normaliser took from the text are not counted;
* other normalisers (NFC, lower case): bytes of the text that the tokenizer saw.

Tokens that mark something (special ones, the end of a document, an unknown token) stand for no text.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import tokenizers

SPACE_SIGN = "▁"
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(pieces: tokenizers.Tokenizer, *, size: int, end_of_document: int | None) -> np.ndarray:
    """int64 [size]; 0 for ids without a token."""
    words = json.loads(pieces.to_str())
    count = _Counter(words)
    found = np.zeros(size, np.int64)
    for piece, number in pieces.get_vocab(with_added_tokens=True).items():
        found[number] = count(piece)
    for number, token in pieces.get_added_tokens_decoder().items():
        found[number] = 0 if token.special else len(token.content.encode())  # spelt as it is, in all models
    for mark in (end_of_document, _unknown(pieces, words["model"])):
        if mark is not None:
            found[mark] = 0
    return found


class _Counter:
    """Bytes of a piece, by how the decoder of its tokenizer reads it."""

    def __init__(self, words: dict[str, Any]):
        parts = list(_parts(words.get("decoder"))) or list(_parts(words.get("pre_tokenizer")))
        kinds = {part["type"]: part for part in parts}
        self._is_byte_level = "ByteLevel" in kinds
        self._is_word_pieces = "WordPiece" in kinds or words["model"]["type"] == "WordPiece"
        self._continues = words["model"].get("continuing_subword_prefix") or ""
        self._word_end = words["model"].get("end_of_word_suffix") or ""
        self._has_byte_pieces = "ByteFallback" in kinds or bool(words["model"].get("byte_fallback"))

    def __call__(self, piece: str) -> int:
        if self._is_byte_level:
            return sum(1 if char in byte_signs() else len(char.encode()) for char in piece)
        if self._has_byte_pieces and BYTE_PIECE.fullmatch(piece):
            return 1
        if self._is_word_pieces:
            is_inner = bool(self._continues) and piece.startswith(self._continues)
            return len(piece.encode()) + (-len(self._continues.encode()) if is_inner else 1)
        if self._word_end and piece.endswith(self._word_end):
            piece = piece.removesuffix(self._word_end) + " "
        return len(piece.replace(SPACE_SIGN, " ").encode())


@cache
def byte_signs() -> frozenset[str]:
    """The 256 characters that stand for bytes: https://github.com/openai/gpt-2/blob/master/src/encoder.py."""
    return frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A decoder or pre-tokenizer, or those that a sequence is made of."""
    if part is None:
        return
    inner = part.get("decoders") or part.get("pretokenizers")
    if inner is None:
        yield part
    for item in inner or ():
        yield from _parts(item)


def _unknown(pieces: tokenizers.Tokenizer, model: dict[str, Any]) -> int | None:
    """The id of the model's unknown token, which BPE and WordPiece name and Unigram numbers."""
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    name = model.get("unk_token")
    return pieces.token_to_id(name) if name is not None else None
