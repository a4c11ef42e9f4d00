"""Cells of tables of tests that others nearly imply: run by `make test-all`, left out of `make test` for time.

Either mark the values of one parameter (`cells`), or name cells by their ids, where several parameters make one or the
ids are written by hand: those that are thorough (`rare`), or those that are not (`everyday`):

    @rare("masked-*", "reset-dp2")

Which features go with which is tried by pairs in `make test` (`parity/covering.py`); tables keep there what those
cells do not show.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def cells(values: Iterable[Any], *, thorough: Collection[str]) -> list[Any]:
    """Parameters under their own names, those named in ``thorough`` marked so."""
    found = [
        pytest.param(value, id=str(value), marks=[pytest.mark.thorough] if str(value) in thorough else [])
        for value in values
    ]
    unknown = set(thorough) - {str(value) for value in values}
    assert not unknown, f"no such cells: {unknown}"
    return found


def rare(*ids: str) -> pytest.MarkDecorator:
    """Of a test with parameters: these cells are for `make test-all`; `*` stands for anything."""
    return pytest.mark.rare(*ids)


def everyday(*ids: str) -> pytest.MarkDecorator:
    """Of a test with parameters: all other cells are for `make test-all`; `*` stands for anything."""
    return pytest.mark.everyday(*ids)


def mark_rare(items: Sequence[pytest.Item], *, all_collected: bool) -> None:
    """Cells get the marker ``thorough`` as `rare` and `everyday` say; where all are collected, each name has a cell."""
    without: dict[Any, set[str]] = {}
    for item in items:
        for mark in item.iter_markers():
            if mark.name not in ("rare", "everyday"):
                continue
            assert isinstance(item, pytest.Function)
            named = {name for name in mark.args if _pattern(name).fullmatch(item.callspec.id)}
            without.setdefault(item.function, set(mark.args)).difference_update(named)
            if bool(named) == (mark.name == "rare"):
                item.add_marker("thorough")
    stale = {function.__qualname__: names for function, names in without.items() if names}
    assert not (all_collected and stale), f"tests.thorough.rare: no such cells: {stale}"


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", ".*"))
