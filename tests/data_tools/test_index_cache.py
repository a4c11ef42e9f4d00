import logging
import multiprocessing
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.index_cache import Arrays, IndexCache, make_folder

ARRAYS: Arrays = {
    "documents": np.arange(1000, dtype=np.int32),
    "ends": np.arange(7, dtype=np.int64) ** 2,
    "none": np.empty((0, 3), dtype=np.uint16),
}


def build() -> Arrays:
    return ARRAYS


def must_not_build() -> Arrays:
    raise AssertionError("it was in the cache")


def same(one: Arrays, two: Arrays) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype
        and one[name].shape == two[name].shape
        and np.array_equal(one[name], two[name])
        for name in one
    )


def test_arrays_are_built_once_then_mapped(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path / "deep" / "cache")
    assert same(cache.get("a", build), ARRAYS)
    again = IndexCache(tmp_path / "deep" / "cache").get("a", must_not_build)
    assert same(again, ARRAYS)
    assert all(array.ctypes.data % 64 == 0 for array in again.values() if array.size)
    assert [path.name for path in cache.folder.iterdir()] == ["a.index"]


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_any_changed_byte_or_cut_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, place: float, flip: int, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = IndexCache(folder)
    cache.store("a", ARRAYS)
    raw = bytearray((folder / "a.index").read_bytes())
    at = int(place * len(raw))
    raw[at] ^= flip
    (folder / "a.index").write_bytes(raw[:at] if cut else raw)
    assert cache.load("a") is None
    assert same(cache.get("a", build), ARRAYS)
    assert same(cache.get("a", must_not_build), ARRAYS), "it was not mended"


def test_a_damaged_file_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.index").write_bytes(b"junk")
    IndexCache(tmp_path).get("a", build)
    assert "a.index is damaged (4 bytes are too few): built again" in caplog.text


def test_a_folder_that_cannot_be_written_costs_only_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = IndexCache(tmp_path / "file" / "cache")
    for name in ("a", "b"):
        assert same(cache.get(name, build), ARRAYS)
    assert cache.failed
    assert caplog.text.count("cannot be written") == 1, "one warning is enough"
    assert "set data.cache to a folder that can be written" in caplog.text


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(stream: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_tools.index_cache.sync", full_disk)
    cache = IndexCache(tmp_path)
    cache.store("a", ARRAYS)
    assert cache.failed and list(tmp_path.iterdir()) == []


def test_a_promised_file_is_waited_for(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path)
    cache.promise("late", patience_s=20.0)
    writer = multiprocessing.get_context("spawn").Process(target=_write_late, args=(tmp_path,))
    writer.start()
    assert same(cache.get("late", must_not_build), ARRAYS)
    writer.join()


@pytest.mark.timeout(60)
def test_a_promise_that_is_not_kept_ends_in_building(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    cache = IndexCache(tmp_path)
    cache.promise("never", patience_s=0.1)
    assert same(cache.get("never", build), ARRAYS)


def test_many_processes_may_build_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    processes = [context.Process(target=_race, args=(tmp_path / "new", start)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert {path.name for path in (tmp_path / "new").iterdir()} == {f"{n}.index" for n in range(20)}


def test_mkdir_tolerates_a_folder_that_appears_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lustre(*args: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "mkdir", lustre)
    make_folder(tmp_path)
    with pytest.raises(OSError, match="Input/output"):
        make_folder(tmp_path / "not there")


def _write_late(folder: Path) -> None:
    time.sleep(0.3)
    IndexCache(folder).store("late", ARRAYS)


def _race(folder: Path, start: Event) -> None:
    cache = IndexCache(folder)
    start.wait()
    for number in range(20):
        assert same(cache.get(str(number), build), ARRAYS)
        assert same(IndexCache(folder).get(str(number), must_not_build), ARRAYS)
    assert not cache.failed
