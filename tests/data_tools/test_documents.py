import json

import pytest

from data_tools.documents import Block, Skips, nothing_left, read_documents, refuse_skips, skipped
from data_tools.errors import DataError


def read(form: str, payload: object, *, first_line: int = 1) -> tuple[list[str], list[str]]:
    """Texts, and what was left out in words."""
    block = Block("in", first_line, form, payload, 0)  # type: ignore[arg-type]
    found = read_documents((block,), text_field="text")
    assert len(found.places) == len(found.texts)
    assert found.text_bytes == sum(len(text.encode()) for text in found.texts)
    return found.texts, [str(skip) for skip in found.skips.examples.values()]


def test_a_text_block_is_one_document_with_its_line_ends() -> None:
    assert read("text", b"a\n\nb\r\n") == (["a\n\nb\r\n"], [])


def test_lines_and_paragraphs_are_cut_where_they_end() -> None:
    assert read("lines", b"a\r\n\n b\nc")[0] == ["a", " b", "c"]
    assert read("paragraphs", b"\n\na\nb\r\n \t\nc\n\n\n\nd")[0] == ["a\nb", "c", "d"]


def test_json_records_give_their_field() -> None:
    lines = [json.dumps({"text": text, "id": 1}) for text in ("a", "b\nc", "ü")]
    assert read("json", "\n\n".join(lines).encode())[0] == ["a", "b\nc", "ü"]


@pytest.mark.parametrize(
    ("form", "payload", "words"),
    [
        ("json", b'{"text": "a"}\n{"text"\n', "in:2: broken JSON"),
        ("json", b'["a"]', "a list, not an object"),
        ("json", b"[" * 100_000, "in:1: broken JSON"),
        ("json", b'{"content": 1, "id": 2}', "no 'text'; fields there: content, id); name the field"),
        ("json", b"{}", "fields there: none"),
        ("json", json.dumps({f"f{n}": 0 for n in range(20)}).encode(), "f11, ...)"),
        ("json", b'{"text": null}', "not text ('text' is null)"),
        ("json", b'{"text": 5}', "'text' is int"),
        ("json", b'{"text": "\xff"}', "in:1: not UTF-8 (byte 0xff)"),
        ("json", b"\xff\xfe{}", "in:1: not UTF-8 (byte 0xff)"),
        ("json", b'{"text": "\\ud800"}', "half a surrogate pair"),
        ("json", b'{"text": " \\n"}', "in:1: empty"),
        ("text", b"fine\nfine\nna\xefve\n", "in:3: not UTF-8 (byte 0xef); convert it"),
        ("lines", b"fine\nna\xefve\n", "in:2: not UTF-8"),
        ("paragraphs", b"fine\n\nna\xefve\n", "in:3: not UTF-8"),
        ("values", ["fine", None], "in:2: not text"),
    ],
)
def test_a_bad_record_is_left_out_and_told_with_its_place(form: str, payload: object, words: str) -> None:
    texts, told = read(form, payload)
    assert texts in ([], ["fine"], ["a"])
    assert len(told) == 1
    assert words in told[0]


def test_line_numbers_count_from_the_blocks_first() -> None:
    assert "in:41: broken JSON" in read("json", b"{}\n{", first_line=40)[1][1]


def test_skips_are_counted_by_reason_and_the_first_of_each_is_kept() -> None:
    skips = Skips()
    for block in (
        skipped("a", 1, "empty"),
        skipped("b", 2, "unreadable", "cut", count=7),
        skipped("c", 3, "empty"),
    ):
        skips.merge(read_documents((block,), text_field="text").skips)
    assert skips.by_reason() == {"empty": 2, "unreadable": 7}
    assert skips.examples["empty"].source == "a"
    assert skips.first is skips.examples["empty"]


def test_strict_stops_at_the_first_with_file_and_line() -> None:
    found = read_documents((Block("in", 1, "json", b'{"text": "a"}\n{\n', 0),), text_field="text")
    with pytest.raises(DataError, match=r"in:2: broken JSON.*--strict stops here"):
        refuse_skips(found.skips)
    refuse_skips(Skips())


def test_when_nothing_is_left_the_most_frequent_reason_is_told() -> None:
    payload = b'{"content": "a"}\n' * 3 + b"{\n"
    found = read_documents((Block("in", 1, "json", payload, 0),), text_field="text")
    message = str(nothing_left(found.skips))
    assert "missing field in 3 of 4 records, first in:1 (no 'text'; fields there: content)" in message
    assert message.endswith("name the field that holds the text with --field NAME")
    one = read_documents((Block("in", 1, "json", b"{", 0),), text_field="text")
    assert "broken JSON in the only record, first in:1" in str(nothing_left(one.skips))
    two = read_documents((Block("in", 1, "json", b"{\n{", 0),), text_field="text")
    assert "broken JSON in all 2 records" in str(nothing_left(two.skips))
    assert "the inputs hold no record at all" in str(nothing_left(Skips()))
