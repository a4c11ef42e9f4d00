"""Nodes with disks of their own are folders here, and ranks are threads; `all_true` is a barrier with a vote."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

from data_tools.errors import DataError
from data_tools.ranks import ALONE, PROBE_NAME, Ranks, is_builder, together
from tests.patience import patient_s


def run_ranks(num_nodes: int, per_node: int, task: Callable[[int, Ranks], object]) -> list[object]:
    """``task(node, ranks)`` on every rank at once; results in rank order."""
    votes: list[bool] = []
    texts: list[tuple[int, str]] = []
    world = num_nodes * per_node
    barrier = threading.Barrier(world)

    def all_true(flag: bool) -> bool:
        votes.append(flag)
        barrier.wait(timeout=patient_s(20))
        result = all(votes[-world:])
        barrier.wait(timeout=patient_s(20))
        return result

    def rank(number: int) -> object:
        node, local = divmod(number, per_node)

        def first_told(text: str | None) -> str | None:
            if text is not None:
                texts.append((number, text))
            barrier.wait(timeout=patient_s(20))
            return min(texts)[1] if texts else None

        return task(node, Ranks(number == 0, local == 0, all_true, first_told))

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank, range(world)))


def builders(tmp_path: Path, scope: Literal["auto", "shared", "per-node"], *, shared: bool) -> list[object]:
    def task(node: int, ranks: Ranks) -> object:
        folder = tmp_path / ("disk" if shared else f"disk{node}")
        return is_builder(folder, scope=scope, ranks=ranks)

    return run_ranks(2, 2, task)


@pytest.mark.parametrize("shared", [True, False])
def test_auto_finds_out_whether_nodes_share_the_disk(tmp_path: Path, shared: bool) -> None:
    one, each = [True, False, False, False], [True, False, True, False]
    assert builders(tmp_path, "auto", shared=shared) == (one if shared else each)
    assert not list(tmp_path.rglob(PROBE_NAME))


def test_a_scope_that_is_named_is_believed(tmp_path: Path) -> None:
    assert builders(tmp_path, "shared", shared=False) == [True, False, False, False]
    assert builders(tmp_path, "per-node", shared=True) == [True, False, True, False]


def test_a_probe_left_by_a_killed_run_does_not_deceive(tmp_path: Path) -> None:
    for node in range(2):
        (tmp_path / f"disk{node}").mkdir()
        (tmp_path / f"disk{node}" / PROBE_NAME).write_text("old")
    assert builders(tmp_path, "auto", shared=False) == [True, False, True, False]


def test_a_folder_that_cannot_be_written_is_taken_for_per_node(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("a file")
    assert builders(tmp_path, "auto", shared=True) == [True, False, True, False]


def test_a_single_process_builds(tmp_path: Path) -> None:
    for scope in ("auto", "shared", "per-node"):
        assert is_builder(tmp_path, scope=scope, ranks=ALONE)  # type: ignore[arg-type]


def test_a_fault_that_some_ranks_meet_is_told_on_all() -> None:
    def task(node: int, ranks: Ranks) -> object:
        def work() -> str:
            if node == 1:
                raise DataError(f"node {node} lacks it")
            return "done"

        with pytest.raises(DataError) as told:
            together(ranks, work)
        return str(told.value)

    assert run_ranks(2, 2, task) == ["node 1 lacks it"] * 4
    assert run_ranks(1, 2, lambda node, ranks: together(ranks, lambda: node)) == [0, 0]
