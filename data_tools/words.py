"""Where words and sentences begin and end in tokens, told from how a vocabulary spells its pieces."""

import numpy as np

from data_tools.tokenizer import Tokenizer

CONTINUES = "##"  # WordPiece: within a word
BEGINS = ("Ġ", "▁", "Ċ", "ĉ")  # byte-level BPE writes spaces, newlines and tabs so; SentencePiece spaces
ENDS = (".", "!", "?", "。", "！", "？", "…", "Ċ", "\n")


class WordTable:
    """Facts of every id of a vocabulary."""

    def __init__(self, tokenizer: Tokenizer):
        pieces = tokenizer.pieces()
        is_word_pieces = any(piece.startswith(CONTINUES) for piece in pieces)
        marks_begins = any(piece.startswith(BEGINS) for piece in pieces)
        if is_word_pieces:
            begins = [not piece.startswith(CONTINUES) for piece in pieces]
        elif marks_begins:
            begins = [piece.startswith(BEGINS) or not piece for piece in pieces]
        else:  # bytes and characters: after what is no letter
            begins = [not piece.isalnum() for piece in pieces]
        self.begins_word = np.array(begins, dtype=np.bool_)  # [v]
        self.ends_sentence = np.array([piece.endswith(ENDS) for piece in pieces], dtype=np.bool_)  # [v]

    def words(self, tokens: np.ndarray) -> np.ndarray:
        """The number of each token's word, from 0 on: int64 [n]"""
        begins = self.begins_word[tokens]
        begins[:1] = True
        return np.cumsum(begins) - 1

    def sentence_ends(self, tokens: np.ndarray) -> np.ndarray:
        """Places after which a sentence ends, the last left out: int64 [sentences - 1]"""
        return np.flatnonzero(self.ends_sentence[tokens[:-1]]) + 1
