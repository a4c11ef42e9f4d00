"""DeepSpeed's per-node launcher in a small process: the same file, the same words, and neither torch nor DeepSpeed."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import node
from tests.patience import patient_s

ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK")
NAMES += ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK")


def started(
    module: list[str], *, script: str, log_level: str = "critical"
) -> subprocess.CompletedProcess[str]:
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 2]}).encode()).decode()
    command = [sys.executable, "-u", "-m", *module, "--log_level", log_level, f"--world_info={world}"]
    command += ["--node_rank=0", "--master_addr=127.0.0.1", "--master_port=1234", script]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=patient_s(120)
    )


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "rank.py"
    path.write_text(
        "import json, os, sys\n"
        f"line = json.dumps([sys.argv[1:], {{name: os.environ.get(name) for name in {NAMES}}}])\n"
        "os.write(1, f'{line}\\n'.encode())  # in one piece: two ranks share the pipe\n"
    )
    return str(path)


def test_the_installed_launcher_is_one_that_was_read() -> None:
    """Otherwise read its changes: all that it imports of DeepSpeed must be in `launch.node`.  Then add its hash."""
    folder = node._deepspeed_folder()
    assert folder is not None and node._hash_of_launcher(folder) in node.KNOWN_SHA256


def test_ranks_find_the_same_environment_as_from_deepspeeds_own_module(script: str) -> None:
    ours = started(["launch.node", node.MODULE], script=script)
    theirs = started([node.MODULE], script=script)
    assert ours.returncode == theirs.returncode == 0, ours.stderr
    lines = [line for line in theirs.stdout.splitlines() if line.startswith("[[")]
    assert sorted(ours.stdout.splitlines()) == sorted(lines) and len(lines) == 2


def test_a_failing_rank_gives_the_launcher_its_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text("import sys; sys.exit(7)")
    ended = started(["launch.node", node.MODULE], script=str(script), log_level="error")
    assert ended.returncode == 7
    assert "[ERROR] [launch.py:" in ended.stdout and "return code = 7" in ended.stdout


def test_a_launcher_that_was_not_read_is_imported_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = node._deepspeed_folder()
    assert folder is not None
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert node._is_known(folder)
    monkeypatch.setattr(node, "KNOWN_SHA256", set())
    assert not node._is_known(folder)


def test_devices_that_another_variable_chooses_are_left_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = node._deepspeed_folder()
    assert folder is not None
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    assert not node._is_known(folder)
