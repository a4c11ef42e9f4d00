"""What a start makes of ranks that refuse, of a launcher that dies, and of both at once."""

import os
import sys
from pathlib import Path

import pytest

from launch.attempt import Attempt, Outcome, new_mark
from launch.backends import Start
from launch.env import LAUNCH_ID
from launch.supervise import Options, Supervisor
from launch.watch import Watch

pytestmark = pytest.mark.ranks

REFUSING = """
import os, sys, time
from pretrain.errors import RunError
from pretrain.program import exit_code
def work():
    if os.environ["RANK"] not in os.environ["REFUSING"]:
        time.sleep(60)
    if os.environ["RANK"] == os.environ["SLOW"]:
        time.sleep(4)
    raise RunError("checkpoint.resume=x: Connection refused by its owner; ask another")
sys.exit(exit_code("pretrain.gpt", work))
"""
TOLD = "pretrain.gpt: checkpoint.resume=x: Connection refused by its owner; ask another\n"
# Starts keepers as DeepSpeed's launcher does, and is killed.
LAUNCHER = """
import os, signal, subprocess, sys, time
for rank in range(2):
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    subprocess.Popen([sys.executable, "-m", "launch.keeper", "finishing"], env={**os.environ, **place})
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
FINISHING = """
import os, sys, time
time.sleep(5)
print("done", flush=True)
sys.exit(int(os.environ["CODES"][int(os.environ["RANK"])]))
"""


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("refusing", REFUSING), ("finishing", FINISHING)):
        (tmp_path / f"{name}.py").write_text(text, "utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path.cwd()}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize(
    ("refusing", "slow"),
    [("012", "none"), ("012", "0"), ("2", "none")],
    ids=["all", "all, and the first is slow", "the last alone"],
)
def test_a_refusal_is_told_once_whichever_rank_is_first(
    refusing: str, slow: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed's launcher ends all ranks when one has ended, often before the first has said a word."""
    monkeypatch.setenv("REFUSING", refusing)
    monkeypatch.setenv("SLOW", slow)
    reports: list[object] = []
    assert Supervisor("refusing", [], Options(num_ranks=3, restarts=1)).run(reports.append) == 2
    told = capfd.readouterr().err
    assert told.count(TOLD) == 1 and not reports, told


def killed_launcher(codes: str) -> Outcome:
    mark = new_mark()
    environment = {**os.environ, LAUNCH_ID: mark, "CODES": codes}
    start = Start([sys.executable, "-c", LAUNCHER], environment)
    return Attempt([start], Watch(2, {}), mark=mark).wait()


def test_ranks_that_finish_after_their_launcher_was_killed_have_finished(
    capfd: pytest.CaptureFixture[str],
) -> None:
    outcome = killed_launcher("00")
    told = capfd.readouterr()
    assert (outcome.code, outcome.failure) == (0, None), told
    assert told.out.count("done") == 2 and told.err.count("they go on without it") == 1


def test_ranks_that_fail_after_their_launcher_was_killed_have_failed() -> None:
    outcome = killed_launcher("03")
    assert outcome.failure is not None and outcome.failure.what.startswith("rank 1 on ")
    assert outcome.code == 3


def test_a_launcher_that_dies_with_its_ranks_is_told() -> None:
    mark = new_mark()
    start = Start(
        [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {**os.environ, LAUNCH_ID: mark}
    )
    outcome = Attempt([start], Watch(2, {}), mark=mark).wait()
    assert outcome.failure is not None
    assert outcome.failure.what == "the launcher ended before ranks 0 to 1 did: it was killed (SIGKILL)"
