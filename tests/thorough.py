"""Cells of a table of tests that others nearly imply: run by `make test-all`, left out of `make test` for time."""

from collections.abc import Collection, Iterable
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
