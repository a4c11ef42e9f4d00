"""A checkpoint is what its manifest says, or it is damaged; nothing is parsed before that is known."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.training_data import check_data
from pretrain.checkpoint import manifest, store
from pretrain.checkpoint.fit import check_before_start
from pretrain.checkpoint.manifest import Damage
from pretrain.checkpoint.state import parse_state, read_state
from pretrain.config_io import make_run
from pretrain.errors import RunError
from tests.pretrain.fake_checkpoints import seal, write_checkpoint
from tests.runs import tiny


@pytest.fixture(scope="module")
def pair(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Path]:
    """A run file, and two checkpoints of it."""
    raw = tiny(corpus, tmp_path_factory.mktemp("pair"))
    run = make_run(raw, world_size=2)
    return raw, write_checkpoint(run, 2), write_checkpoint(run, 4)


@pytest.mark.parametrize("name", [store.STATE, manifest.MANIFEST, store.CONFIG])
def test_a_flipped_bit_is_damage_and_never_a_false_reason(
    pair: tuple[dict[str, Any], Path, Path], name: str
) -> None:
    raw, _, newest = pair
    run = make_run(raw, world_size=2)
    data = check_data(run.config.data)
    path = newest / name
    whole = path.read_bytes()
    chance = random.Random(3)
    try:
        for place in chance.sample(range(len(whole) * 8), 300):
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            check_before_start(run, data)  # by the older one
            if json_of(flipped) != json_of(whole):  # white space of the manifest says nothing
                assert list(manifest.faults(newest)), f"bit {place}"
    finally:
        path.write_bytes(whole)
    assert not list(manifest.faults(newest))


def json_of(text: bytes | bytearray) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return bytes(text)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A manifest that was changed, with its own hash set right."""

    def spoil(folder: Path) -> None:
        raw = json.loads((folder / manifest.MANIFEST).read_text())
        change(raw)
        raw["xxh3"] = manifest._digest(raw["files"])
        (folder / manifest.MANIFEST).write_text(json.dumps(raw))

    return spoil


def text(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / manifest.MANIFEST).write_text(content) and None


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "null": (text("null"), "was changed"),
    "number": (text("7"), "was changed"),
    "list": (text("[]"), "was changed"),
    "empty": (text(""), "no readable"),
    "deep": (text("[" * 100_000), "no readable"),
    "no files": (text('{"format": 2}'), "was changed"),
    "files is a number": (edited(lambda raw: raw.update(files=3)), "was changed"),
    "older format": (edited(lambda raw: raw.update(format=1)), "was changed"),
    "entry is a number": (edited(lambda raw: raw["files"].append(3)), "an entry is not"),
    "entry lacks a field": (edited(lambda raw: raw["files"][0].pop("xxh3")), "an entry is not"),
    "size is a word": (edited(lambda raw: raw["files"][0].update(bytes="7")), "an entry is not"),
    "leads out": (edited(lambda raw: raw["files"][0].update(path="../x")), "leads out"),
    "absolute": (edited(lambda raw: raw["files"][0].update(path="/etc/passwd")), "leads out"),
    "lists less": (edited(lambda raw: raw["files"].pop(0)), "not listed in manifest.json"),
    "link": (
        lambda folder: _linked(folder / "weights" / "tensors", folder.parent / "elsewhere"),
        "a link that leads out",
    ),
    "linked folder": (
        lambda folder: _linked(folder / "weights", folder.parent / "elsewhere"),
        "a link that leads out",
    ),
}


def _linked(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("how", SPOILT)
def test_a_malformed_manifest_is_damage_and_the_older_checkpoint_is_taken(
    corpus: str, tmp_path: Path, how: str
) -> None:
    spoil, what = SPOILT[how]
    run = make_run(tiny(corpus, tmp_path), world_size=2)
    write_checkpoint(run, 2)
    newest = write_checkpoint(run, 4)
    spoil(newest)
    found = list(manifest.faults(newest))
    assert found and what in " ".join(found)
    check_before_start(run, check_data(run.config.data))


@pytest.mark.parametrize(
    "content", ["", "null", "3", "[]", "{}", '{"format": 2}', '{"format": 9}', "[" * 100_000]
)
def test_a_state_that_is_none_is_one_line_even_with_a_manifest_that_lists_it(
    corpus: str, tmp_path: Path, content: str
) -> None:
    folder = write_checkpoint(make_run(tiny(corpus, tmp_path), world_size=2), 4)
    (folder / store.STATE).write_text(content)
    again = folder.rename(folder.with_name(folder.name + store.PARTIAL))
    (again / manifest.MANIFEST).unlink()
    sealed = seal(again)
    with pytest.raises(RunError) as refusal:
        read_state(sealed)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("field", ["step", "consumed_samples", "layout", "run", "tokenizer"])
def test_a_state_with_a_field_of_another_kind_is_one_line(
    pair: tuple[dict[str, Any], Path, Path], field: str
) -> None:
    _, folder, _ = pair
    raw = json.loads((folder / store.STATE).read_text())
    for value in (None, "x", [1], 1.5):
        if isinstance(raw[field], str) and isinstance(value, str):
            continue
        with pytest.raises(RunError, match="is not a run's state"):
            parse_state(json.dumps({**raw, field: value}), folder)


def test_a_small_file_is_read_only_if_it_is_the_one_that_was_written(
    pair: tuple[dict[str, Any], Path, Path],
) -> None:
    _, folder, _ = pair
    assert manifest.verified_text(folder, store.CONFIG).startswith("name: tiny")
    with pytest.raises(Damage, match="not listed"):
        manifest.verified_text(folder, "absent.json")
