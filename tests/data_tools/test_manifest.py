from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.manifest import Manifest, load_manifest
from tests.data_tools.making import make_corpus


def test_a_manifest_reads_back_as_itself(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path / "c", ["a", ""]).manifest
    assert load_manifest(tmp_path / "c") == manifest
    assert Manifest.model_validate_json(manifest.to_bytes()) == manifest


def test_the_same_inputs_give_the_same_bytes_on_any_day_and_host(tmp_path: Path) -> None:
    first = make_corpus(tmp_path / "c", ["a"]).manifest.to_bytes()
    assert make_corpus(tmp_path / "c", ["a"], force=True).manifest.to_bytes() == first


def test_none_and_broken_are_told_apart(tmp_path: Path) -> None:
    assert load_manifest(tmp_path / "c") is None
    for content in ('{"format": 2}', "junk", ""):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(DataError, match=r"c\.json cannot be read") as told:
            load_manifest(tmp_path / "c")
        assert "\n" not in str(told.value)
