"""Types hold, by mypy's strict rules (pyproject.toml); a test, so that it runs beside others."""

import subprocess
import sys

import pytest

ROOMS = ("launch", "pretrain", "data_tools", "model_providers")


@pytest.mark.timeout(600)
def test_types_hold_in_every_room() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy", *ROOMS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
