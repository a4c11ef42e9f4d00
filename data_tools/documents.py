"""From a block of raw input to documents, counting what is left out and why.

A pure function that runs in the workers: the parent process only cuts files into blocks (`corpora`), so
decoding and JSON parsing run in parallel too.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from data_tools.errors import DataError

Form = Literal["text", "lines", "paragraphs", "json", "values", "skipped"]

EMPTY, NOT_UTF8, BROKEN_JSON = "empty", "not UTF-8", "broken JSON"
MISSING_FIELD, NOT_TEXT, UNREADABLE, NO_TOKENS = "missing field", "not text", "unreadable", "no tokens"

MAX_FIELDS_SHOWN = 12

# What a user can do about each; the same words whether one line or a whole corpus is concerned.
ADVICE = {
    EMPTY: "remove it, or give inputs that hold text",
    NOT_UTF8: "convert it, for example with `iconv -f LATIN1 -t UTF-8`",
    BROKEN_JSON: "each line must be one whole JSON object",
    MISSING_FIELD: "name the field that holds the text with --field NAME",
    NOT_TEXT: "name a field of strings with --field NAME",
    UNREADABLE: "the file was cut short or is of another kind: fetch it again",
    NO_TOKENS: "the tokenizer turns it into nothing: try another tokenizer",
}


@dataclass(frozen=True)
class Block:
    """A piece of one input, small enough to travel to a worker."""

    source: str
    first_line: int  # line, row or document number of its first record, from 1
    form: Form
    payload: Any  # bytes; a list for "values"; for "skipped" the Skip and how many records it stands for
    bytes_read: int  # how far it moves us through the input, as stored on disk


@dataclass(frozen=True)
class Skip:
    """One record that was left out."""

    reason: str
    source: str
    line: int
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}{self._detail}; {ADVICE[self.reason]}"

    def as_first_of(self, amount: str) -> str:
        """The account of all records with this reason: how many, where the first is, and what to do."""
        return (
            f"{self.reason} in {amount}, first {self.source}:{self.line}{self._detail}; {ADVICE[self.reason]}"
        )

    @property
    def _detail(self) -> str:
        return f" ({self.detail})" if self.detail else ""


@dataclass
class Skips:
    """How many records were left out, by reason, with the first of each kept as an example."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Skip] = field(default_factory=dict)
    first: Skip | None = None

    def add(self, skip: Skip, *, count: int = 1) -> None:
        self.counts[skip.reason] += count
        self.examples.setdefault(skip.reason, skip)
        self.first = self.first or skip

    def merge(self, later: "Skips") -> None:
        self.counts.update(later.counts)
        for reason, skip in later.examples.items():
            self.examples.setdefault(reason, skip)
        self.first = self.first or later.first

    def accounts(self) -> list[str]:
        """One line for each reason."""
        return [skip.as_first_of(_records_of(self.counts[reason])) for reason, skip in self.examples.items()]

    def by_reason(self) -> dict[str, int]:
        return dict(sorted(self.counts.items()))


@dataclass
class Documents:
    """The texts of some blocks, what they weigh, and what was left out."""

    texts: list[str] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)  # source and line of each text
    text_bytes: int = 0
    skips: Skips = field(default_factory=Skips)


def read_documents(blocks: tuple[Block, ...], *, text_field: str) -> Documents:
    """All documents of ``blocks``, in order."""
    found = Documents()
    for block in blocks:
        if block.form == "skipped":
            skip, count = block.payload
            found.skips.add(skip, count=count)
            continue
        for line, value in _records(block, text_field):
            if isinstance(value, Skip):
                found.skips.add(value)
            else:
                _take(found, block, line, value)
    return found


def skipped(source: str, line: int, reason: str, detail: str = "", *, count: int = 1) -> Block:
    """A block that stands for ``count`` records that a reader could not give."""
    return Block(source, line, "skipped", (Skip(reason, source, line, detail), count), 0)


def refuse_skips(skips: Skips) -> None:
    """Under ``--strict`` the first record that would be left out stops the run, with its place."""
    if skips.first is not None:
        raise DataError(f"{skips.first} (--strict stops here)")


def nothing_left(skips: Skips) -> DataError:
    """Why a run that skipped everything came to nothing, by its most frequent reason."""
    if not skips.counts:
        return DataError("no document is left: the inputs hold no record at all; give files that hold text")
    reason, count = skips.counts.most_common(1)[0]
    total = skips.counts.total()
    amount = f"{count:,} of {_records_of(total)}"
    if count == total:
        amount = f"all {_records_of(total)}" if total > 1 else "the only record"
    return DataError(f"no document is left: {skips.examples[reason].as_first_of(amount)}")


def _records_of(count: int) -> str:
    return f"{count:,} record" + ("" if count == 1 else "s")


def _take(found: Documents, block: Block, line: int, value: str) -> None:
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no text holds
        found.skips.add(Skip(NOT_UTF8, block.source, line, "half a surrogate pair"))
        return
    if not value or value.isspace():
        found.skips.add(Skip(EMPTY, block.source, line))
        return
    found.texts.append(value)
    found.places.append((block.source, line))
    found.text_bytes += num_bytes


def _records(block: Block, text_field: str) -> Iterator[tuple[int, str | Skip]]:
    if block.form == "values":
        yield from _value_records(block, text_field)
    elif block.form == "paragraphs":
        yield from _paragraphs(block)
    elif block.form == "text":
        yield block.first_line, _decode(block, block.first_line, block.payload)
    else:
        yield from _lines(block, text_field)


def _lines(block: Block, text_field: str) -> Iterator[tuple[int, str | Skip]]:
    for number, line in enumerate(block.payload.split(b"\n"), start=block.first_line):
        if not line.strip():
            continue  # a blank line, or the nothing after the last newline, is no record
        if block.form == "json":
            yield number, _json(block, number, line, text_field)
        else:
            yield number, _decode(block, number, line.rstrip(b"\r"))


def _decode(block: Block, line: int, data: bytes) -> str | Skip:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        # In a whole file the offending line says more than an offset.
        line += data[: error.start].count(b"\n")
        return Skip(NOT_UTF8, block.source, line, f"byte 0x{data[error.start]:02x}")


def _json(block: Block, line: int, data: bytes, text_field: str) -> str | Skip:
    text = _decode(block, line, data)  # given bytes, json.loads would guess at UTF-16 and UTF-32
    if isinstance(text, Skip):
        return text
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        return Skip(BROKEN_JSON, block.source, line, f"{error.msg} at column {error.colno}")
    except RecursionError:
        return Skip(BROKEN_JSON, block.source, line, "nested too deeply")
    if not isinstance(record, dict):
        return Skip(BROKEN_JSON, block.source, line, f"a {type(record).__name__}, not an object")
    if text_field not in record:
        return Skip(MISSING_FIELD, block.source, line, no_field(text_field, list(record)))
    return _only_text(block, line, record[text_field], text_field)


def no_field(text_field: str, fields: list[str]) -> str:
    """What every reader says about a record without the field; long lists are cut."""
    shown = ", ".join(fields[:MAX_FIELDS_SHOWN]) + (", ..." if len(fields) > MAX_FIELDS_SHOWN else "")
    return f"no {text_field!r}; fields there: {shown or 'none'}"


def _only_text(block: Block, line: int, value: Any, text_field: str) -> str | Skip:
    if isinstance(value, str):
        return value
    kind = "null" if value is None else type(value).__name__
    return Skip(NOT_TEXT, block.source, line, f"{text_field!r} is {kind}")


def _value_records(block: Block, text_field: str) -> Iterator[tuple[int, str | Skip]]:
    for row, value in enumerate(block.payload, start=block.first_line):
        yield row, _only_text(block, row, value, text_field)


def _paragraphs(block: Block) -> Iterator[tuple[int, str | Skip]]:
    lines: list[bytes] = []
    start = block.first_line
    for number, line in enumerate([*block.payload.split(b"\n"), b""], start=block.first_line):
        if line.strip():
            start = start if lines else number
            lines.append(line.rstrip(b"\r"))
        elif lines:
            yield start, _decode(block, start, b"\n".join(lines))
            lines = []
