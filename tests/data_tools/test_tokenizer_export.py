"""An exported tokenizer has what the objective appended, under the ids that the model was trained with."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from data_tools.objectives import FillInTheMiddle, MaskedLM, Objective, SpanCorruption
from data_tools.special_tokens import special_tokens
from data_tools.tokenizer import load_tokenizer
from data_tools.tokenizer_export import complete


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(["a rose is a rose is a rose"], trainer)
    pieces.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return tmp_path


def exported(folder: Path, objective: Objective | None) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(str(folder))
    special = special_tokens(tokenizer, objective)
    complete(folder, objective, special, end_of_document=tokenizer.end_of_document)
    return AutoTokenizer.from_pretrained(folder), special


def test_a_plain_one_learns_which_token_ends_a_text(folder: Path) -> None:
    theirs, _ = exported(folder, None)
    assert theirs.eos_token == "<|endoftext|>" and theirs("a rose")["input_ids"]


def test_masked_text_and_pairs(folder: Path) -> None:
    theirs, special = exported(folder, MaskedLM())
    assert (theirs.mask_token_id, theirs.cls_token_id) == (special["mask"], special["begin"])
    assert (theirs.sep_token_id, theirs.pad_token_id) == (special["separator"], special["padding"])
    ids = theirs("a [MASK] is", "a rose")
    assert ids["input_ids"][0] == special["begin"] and special["mask"] in ids["input_ids"]
    assert ids["input_ids"].count(special["separator"]) == 2


def test_sentinels(folder: Path) -> None:
    theirs, special = exported(folder, SpanCorruption())
    ids = theirs("a <extra_id_0> is")["input_ids"]
    assert special["sentinel-0"] in ids and ids[-1] == theirs.eos_token_id
    assert theirs.pad_token_id == special["padding"] and len(theirs) == special.vocab_size


def test_marks_of_a_middle(folder: Path) -> None:
    theirs, special = exported(folder, FillInTheMiddle())
    assert theirs("<|fim_prefix|>a")["input_ids"][0] == special["prefix"]
    assert "eos_token" in json.loads((folder / "tokenizer_config.json").read_text())
