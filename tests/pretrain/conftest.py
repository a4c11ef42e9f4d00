"""A corpus and an output folder for tests of the pretrain room."""

from pathlib import Path

import pytest

from tests.runs import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
