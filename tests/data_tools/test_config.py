import json

import pytest
from pydantic import ValidationError

from data_tools.config import CorpusRef, DataConfig, parse_split


def config(**fields: object) -> DataConfig:
    return DataConfig.model_validate({"train": "a", "sequence_length": 8, **fields})


def test_a_corpus_may_be_spelled_short() -> None:
    ref = (CorpusRef(path="a"),)
    for spelling in ("a", ["a"], {"path": "a"}, [{"path": "a", "weight": 1}], CorpusRef(path="a")):
        assert config(train=spelling).train == ref
    assert config(validation={"wiki": "a"}).validation == {"wiki": ref}


def test_a_resolved_config_reads_back_as_itself() -> None:
    before = config(train=["a", {"path": "b", "weight": 0.5}], validation={"w": "c"}, documents="reset")
    assert DataConfig.model_validate(json.loads(before.model_dump_json())) == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train": []}, "no corpus is named"),
        ({"train": {"path": "a", "weight": -1}}, "weight=-1.0 is negative"),
        ({"train": [{"path": "a", "weight": 0}]}, r"weight=0 for every corpus \(a\)"),
        ({"validation": {"w": []}}, "no corpus is named"),
        ({"train": {"path": "a", "weight": float("nan")}}, "finite"),
        ({"split": "98;2"}, "shares such as 98,2,0"),
        ({"split": "1,2,3,4"}, "4 numbers, at most 3"),
        ({"split": "0,1,0"}, "the first above 0"),
        ({"split": "90,-1,0"}, "not negative"),
        ({"validation": {"valid": "b"}}, "'valid' is both a named set and a part of split=98,2,0"),
        ({"split": "90,0,10", "test": {"test": "b"}}, "'test' is both a named set"),
        ({"sequence_length": 0}, "greater than 0"),
        ({"sequence_lenght": 8}, "Extra inputs"),
        ({"train": 3}, "tuple"),
        ({"train": ["a", "b", "a"]}, "path=a is named twice in one blend"),
    ],
)
def test_a_mistake_is_told_in_words(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**fields)


def test_split_shares_have_any_scale() -> None:
    assert parse_split("98,2,0") == (0.98, 0.02, 0.0)
    assert parse_split("3,1") == (0.75, 0.25, 0.0)
    assert config(split=[1, 1, 2]).split == "1,1,2"
