"""Whatever moment a process dies at, a folder with a proper name is complete and `latest` names one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.checkpoint import manifest, store

SAVE_FOR_EVER = """
import sys
from pathlib import Path
from pretrain.checkpoint import manifest, store
root = Path(sys.argv[1])
for step in range(1, 10**6):
    folder = store.partial_folder(root, step)
    for part in range(4):
        (folder / f"part{part}").write_bytes(bytes([step % 256]) * 20_000)
    store.complete(folder, [manifest.record(folder, path) for path in manifest.files_of(folder)])
    store.prune(root, 2)
    if step == 3:
        print("going", flush=True)
"""


def make(root: Path, step: int, text: str = "x") -> Path:
    folder = store.partial_folder(root, step)
    (folder / "weights").mkdir()
    (folder / "weights" / "w").write_text(text)
    return store.complete(folder, [manifest.record(folder, path) for path in manifest.files_of(folder)])


@pytest.mark.parametrize("moment_s", [0.0, 0.003, 0.011, 0.027, 0.05])
def test_a_kill_while_saving_leaves_only_whole_checkpoints(tmp_path: Path, moment_s: float) -> None:
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert saver.stdout is not None and saver.stdout.readline() == "going\n"
    time.sleep(moment_s)
    saver.send_signal(signal.SIGKILL)
    saver.communicate()
    found = store.checkpoints(tmp_path)
    assert 2 <= len(found) <= 3
    assert [fault for folder in found for fault in manifest.faults(folder)] == []
    assert (tmp_path / (tmp_path / "latest").read_text().strip()).is_dir()


def test_left_overs_of_an_interrupted_save_go_with_the_next(tmp_path: Path) -> None:
    (tmp_path / "step-0000001.partial").mkdir()
    (tmp_path / "step-0000001.partial" / "half").touch()
    make(tmp_path, 2)
    store.prune(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-0000002"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    make(tmp_path, 1, "old")
    again = make(tmp_path, 1, "new")
    assert (again / "weights" / "w").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-0000001"]


def test_a_users_word_may_be_the_run_its_checkpoints_or_one_of_them(tmp_path: Path) -> None:
    newest = [make(tmp_path / "run" / "checkpoints", step) for step in (9, 10)][-1]
    for word in (tmp_path / "run", tmp_path / "run" / "checkpoints", newest):
        assert store.checkpoint_in(word) == newest
    assert store.checkpoint_in(tmp_path) is None
    assert store.checkpoint_in(tmp_path / "nowhere") is None


def test_each_rank_checks_its_share_of_the_files(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    listed = json.loads((folder / manifest.MANIFEST).read_text())["files"]
    assert [item["path"] for item in listed] == ["weights/w"]
    (folder / "weights" / "w").unlink()
    assert [list(manifest.faults(folder, share=share, shares=2)) for share in (0, 1)] == [
        ["weights/w: missing"],
        [],
    ]


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    store.write_whole(path, "one")
    store.write_whole(path, "two")
    assert path.read_text() == "two" and os.listdir(tmp_path) == ["state.json"]


def test_a_checkpoint_that_was_moved_and_linked_is_kept_where_it_went(tmp_path: Path) -> None:
    root, archive = tmp_path / "checkpoints", tmp_path / "archive"
    for step in (1, 2, 3):
        written = store.partial_folder(root, step)
        (written / "weights").mkdir()
        store.complete(written, [])
    archive.mkdir()
    for step in (1, 2):
        (root / store.folder_name(step)).rename(archive / store.folder_name(step))
        (root / store.folder_name(step)).symlink_to(archive / store.folder_name(step))
    (root / "step-0000009.deleted.partial").symlink_to(archive)
    store.prune(root, 2)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-0000002", "step-0000003"]
    store.set_aside(root / store.folder_name(2))
    (root / store.folder_name(2)).symlink_to(archive / "gone")  # to nowhere
    written = store.partial_folder(root, 2)
    assert store.complete(written, []).is_dir() and not (root / store.folder_name(2)).is_symlink()
    (root / store.folder_name(2)).rename(tmp_path / "away")
    (root / store.folder_name(2)).symlink_to(archive / store.folder_name(2))
    store.set_aside(root / store.folder_name(2))  # where a link stands aside already
    assert all((archive / store.folder_name(step) / "weights").is_dir() for step in (1, 2))


def test_what_a_killed_process_was_about_to_write_is_removed(tmp_path: Path) -> None:
    for name in ("latest.123.tmp", "run.yaml.9.tmp", "notes.tmp", "latest"):
        (tmp_path / name).write_text("")
    store.remove_temporary(tmp_path, tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "notes.tmp"]
