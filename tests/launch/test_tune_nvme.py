"""`megaloom tune-nvme`: DeepSpeed's tuner measures, its logs are read, the JSON gets what DeepSpeed reads."""

import json
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import tune_nvme
from launch.__main__ import main
from launch.nvme_logs import GIB, Setting, Speed, best, read_logs
from launch.tune_nvme import aio_section, as_table, file_system
from pretrain.ds_schema import ACCEPTED, key_faults
from pretrain.engine.preflight import libaio_is_there
from pretrain.errors import RunError
from tests.patience import patient_s

SLOW = Setting(1 << 20, 8, 1, False, True)
FAST = Setting(8 << 20, 32, 4, True, False)
SPEEDS = {SLOW: Speed(1e9, 1e9), FAST: Speed(2e9, 0.5e9)}
COMPILE_S = 800


def write_log(folder: Path, way: str, name: str, gib_per_s: float) -> None:
    """As deepspeed/nvme/test_ds_aio_utils.py reports."""
    logs = folder / f"_aio_bench_{way}_logs"
    logs.mkdir(exist_ok=True)
    title = way.capitalize()
    text = f"args = Namespace()\nTask {title} Speed = 9 GB/sec\nE2E {title} Latency = 1 sec\n"
    (logs / f"{way}_{name}.txt").write_text(text + f"E2E {title} Speed = {gib_per_s} GB/sec\n")


def test_logs_are_settings_and_speeds(tmp_path: Path) -> None:
    for way, speed in (("read", 2.0), ("write", 0.5)):
        write_log(tmp_path, way, "single_sequential_ftd1_d32_bs8M_p4", speed)
    write_log(tmp_path, "read", "block_overlap_ftd1_d8_bs512K_p1", 3.0)  # was never written
    assert read_logs(tmp_path) == {FAST: Speed(2.0 * GIB, 0.5 * GIB)}


def test_a_tuner_that_measured_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no setting was both read and written"):
        read_logs(tmp_path)


def test_the_best_is_the_fastest_in_both_directions_together() -> None:
    assert best(SPEEDS) == FAST
    assert best({SLOW: Speed(1, 1), FAST: Speed(1, 1)}) == SLOW, "of equals the one that asks for least"


def test_the_section_is_what_deepspeed_reads() -> None:
    """Its own tuner says num_threads, which its JSON does not know."""
    section = aio_section(FAST)
    assert not list(key_faults({"aio": section}))
    assert set(section) == (ACCEPTED["aio"] or set()) - {"use_gds"}
    assert section["intra_op_parallelism"] == 4


def test_the_table_has_the_fastest_first(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=120).print(as_table(SPEEDS, FAST))
    rows = [line for line in capsys.readouterr().out.splitlines() if "MiB" in line]
    assert "8 MiB" in rows[0] and "best" in rows[0] and "0.50" in rows[0] and "best" not in rows[1]


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = f"/dev/vda / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\n"
    assert file_system(tmp_path / "below", mounts) == "tmpfs"
    assert file_system(tmp_path.parent, mounts) == "ext4"


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["tune-nvme", *words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_tuned_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such folder; make it on the disk" in complaint(capsys, str(tmp_path / "none"))
    assert "is memory and no disk" in complaint(capsys, "/dev/shm")
    assert "make room, or a smaller --megabytes=" in complaint(
        capsys, str(tmp_path), "--megabytes", str(1 << 40)
    )
    assert "give the DeepSpeed JSON" in complaint(capsys, str(tmp_path), "--out", "x.json")
    assert "no such file" in complaint(capsys, str(tmp_path), "--json", "none.json")
    monkeypatch.setattr(tune_nvme.os, "access", lambda *_: False)
    assert "may not be written to" in complaint(capsys, str(tmp_path))


def tuned(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(tune_nvme, "sweep", lambda *_, **__: SPEEDS)
    monkeypatch.setattr(tune_nvme, "MEMORY_FILE_SYSTEMS", ())
    main(["tune-nvme", *words])


def test_the_json_is_copied_or_set_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document: dict[str, Any] = {
        "zero_optimization": {"stage": 3},
        "aio": {"use_gds": False, "queue_depth": 1},
    }
    original, copy = tmp_path / "ds.json", tmp_path / "copy.json"
    original.write_text(json.dumps(document))
    tuned(monkeypatch, str(tmp_path), "--json", str(original), "--out", str(copy))
    assert json.loads(original.read_text()) == document
    wanted = {**document, "aio": {"use_gds": False, **aio_section(FAST)}}
    assert json.loads(copy.read_text()) == wanted
    tuned(monkeypatch, str(tmp_path), "--json", str(original))
    assert json.loads(original.read_text()) == wanted
    assert {path.name for path in tmp_path.iterdir()} == {"ds.json", "copy.json"}


def test_a_failing_tuner_says_why_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_nvme, "TUNER", "no.such.module")
    monkeypatch.setattr(tune_nvme, "MEMORY_FILE_SYSTEMS", ())
    assert "DeepSpeed's tuner: " in complaint(capsys, str(tmp_path), "--megabytes", "1")
    assert not list(tmp_path.iterdir())


def test_a_stopped_tuning_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from launch import tune_nvme; tune_nvme.MEMORY_FILE_SYSTEMS = ();"
        f"tune_nvme._watch = lambda *_: time.sleep(60); tune_nvme.main([{str(tmp_path)!r}])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until_s = time.monotonic() + patient_s(30)
    while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=patient_s(30))
    assert not list(tmp_path.iterdir())


@pytest.mark.nvme
@pytest.mark.timeout(COMPILE_S)
@pytest.mark.skipif(not libaio_is_there(), reason="needs libaio (apt install libaio-dev)")
def test_deepspeeds_tuner_measures_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_nvme, "MEMORY_FILE_SYSTEMS", ())  # a temporary folder may be in memory
    space: tune_nvme.Space = {
        "block_size": ["1M"],
        "queue_depth": [8],
        "io_parallel": [2],
        "sequential_requests": [False],
        "single_submit": [False],
    }
    told = StringIO()
    speeds = tune_nvme.sweep(tmp_path, space, megabytes=4, console=Console(file=told))
    assert tune_nvme.STARTS.split()[0] in told.getvalue() and " of 2" in told.getvalue()
    assert [setting.threads for setting in speeds] == [2]
    assert all(speed.read_bytes_per_s > 0 and speed.write_bytes_per_s > 0 for speed in speeds.values())
    assert not list(tmp_path.iterdir())
