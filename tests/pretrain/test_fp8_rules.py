"""Limits that nobody would look at, and looks where nothing can be seen, are refused with the way out."""

from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import RunError
from tests.runs import checked, tiny


@pytest.mark.parametrize(
    ("fp8", "message"),
    [
        (
            {"recipe": "current", "watch_every": 0, "guard": {"overflow": 0.2}},
            r"fp8\.guard\.overflow=0\.2 with fp8\.watch_every=0.*set fp8\.watch_every=50, or leave the limit out",
        ),
        (
            {"recipe": "current", "guard": {"gap": 0.1}},
            r"fp8\.guard\.gap=0\.1 with fp8\.shadow_every=0.*set fp8\.shadow_every=100, or leave the limit out",
        ),
        (
            {"recipe": "current", "backend": "te", "watch_every": 10},
            r"fp8\.watch_every=10 with fp8\.backend=te.*use fp8\.backend=torch, or leave fp8\.watch_every out",
        ),
        (
            {"recipe": "current", "backend": "te", "guard": {"strikes": 5}},
            r"fp8\.guard with fp8\.backend=te.*use fp8\.backend=torch, or leave fp8\.guard out",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(corpus: str, out: Path, fp8: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        checked(tiny(corpus, out, fp8=fp8, kernels="auto"), 1)


@pytest.mark.parametrize(
    "fp8",
    [
        {"recipe": "current"},
        {"recipe": "current", "watch_every": 0, "guard": None},
        {"recipe": "current", "shadow_every": 10, "guard": {"gap": 0.1}},
        {"recipe": "current", "watch_every": 0, "guard": {"retry": False}},
    ],
)
def test_what_is_looked_at_may_have_limits(corpus: str, out: Path, fp8: dict[str, Any]) -> None:
    assert checked(tiny(corpus, out, fp8=fp8), 1).config.fp8 is not None
