"""Nested dicts by dotted keys: `batch.micro_size` of a run file, `zero_optimization.stage` of a JSON."""

from collections.abc import Iterable
from typing import Any


class NoSection(Exception):
    """A dotted path leads through a single value; the text is where that stands."""


def get(document: dict[str, Any], path: str) -> Any:
    """The value under a dotted path, or None."""
    for word in path.split("."):
        if not isinstance(document, dict) or word not in document:
            return None
        document = document[word]
    return document


def put(document: dict[str, Any], path: str, value: Any) -> None:
    """Set the value under a dotted path, making sections on the way."""
    *sections, last = path.split(".")
    for depth, word in enumerate(sections, 1):
        if document.get(word) is None:
            document[word] = {}
        document = document[word]
        if not isinstance(document, dict):
            raise NoSection(".".join(sections[:depth]))
    document[last] = value


def leaves(document: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted paths and values of everything that is not a section."""
    for key, value in document.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
