"""A folder that one run swaps to is no other run's."""

import fcntl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.engine.swap_folders import hold_folders
from pretrain.errors import RunError


def document(folder: Path) -> dict[str, Any]:
    return {
        "zero_optimization": {
            "offload_param": {"device": "nvme", "nvme_path": str(folder)},
            "offload_optimizer": {"device": "cpu"},
        }
    }


def test_a_folder_in_use_is_refused_and_free_when_its_run_is_gone(tmp_path: Path) -> None:
    groups: Any = SimpleNamespace(rank=0, first_told=lambda text: text)
    other = (tmp_path / "megaloom.rank0.lock").open("w")
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(
        RunError, match=rf"nvme_path={tmp_path} on .*: another run swaps to it; give each run"
    ):
        hold_folders(document(tmp_path), groups)
    with pytest.raises(RunError, match=r"cannot be written .*; give a folder that can"):
        hold_folders(document(tmp_path / "gone"), groups)
    other.close()
    hold_folders(document(tmp_path), groups)
    hold_folders(document(tmp_path), groups)  # another engine of the same process
    with pytest.raises(BlockingIOError):
        fcntl.flock((tmp_path / "megaloom.rank0.lock").open("w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
