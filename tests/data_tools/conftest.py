"""A small BPE tokenizer, trained once for all tests of this folder."""

from pathlib import Path

import pytest
from hypothesis import settings

from data_tools.tokenizer_training import train_tokenizer
from tests.data_tools.making import words

settings.register_profile("megaloom", deadline=None)  # a busy machine is no failure
settings.load_profile("megaloom")


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    train_tokenizer((words(number) for number in range(50)), vocab_size=300).save(str(path))
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, made the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
