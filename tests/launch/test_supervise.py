"""When a run is started again, and when it is not."""

from collections.abc import Sequence
from datetime import datetime

import pytest

from launch.attempt import Outcome
from launch.report import Started
from launch.supervise import Options, Supervisor
from launch.watch import Failure
from pretrain.errors import RunError

KILLED = Failure("rank 1 on n2 was killed (SIGKILL)", "n2", 1, 137)
MISTAKE = Failure("rank 0 on n1 ended with exit code 2", "n1", 0, 2, was_shown=True)


class Scripted(Supervisor):
    """Starts that end as they are told to."""

    def __init__(self, *ends: Failure | RunError | None, restarts: int = 0, was_asked: bool = False):
        super().__init__("pretrain.gpt", ["run.yaml"], Options(restarts=restarts, pause_s=0.0))
        self.ends, self.was_asked, self.started = list(ends), was_asked, list[Sequence[str]]()

    def _start(self, arguments: Sequence[str]) -> Outcome:
        self.started.append(arguments)
        end = self.ends.pop(0)
        if isinstance(end, RunError):
            raise end
        outcome = Outcome(end.code if end else 0, end, self.was_asked, 5)
        self.history.append(Started(datetime(2026, 1, 1), (), outcome))
        return outcome


def run(supervisor: Scripted) -> tuple[int, int]:
    """The exit code, and how many starts the report tells of (0: there is none)."""
    told: list[int] = []
    code = supervisor.run(lambda history: told.append(len(history)), ["checkpoint.resume=auto"])
    return code, told[0] if told else 0


@pytest.mark.parametrize(
    ("supervisor", "code", "reported", "starts"),
    [
        (Scripted(None), 0, 0, 1),
        (Scripted(KILLED), 137, 1, 1),
        (Scripted(KILLED, None, restarts=2), 0, 0, 2),
        (Scripted(KILLED, KILLED, KILLED, restarts=2), 137, 3, 3),
        (Scripted(MISTAKE, restarts=2), 2, 0, 1),
        (Scripted(MISTAKE._replace(was_shown=False), restarts=2), 2, 1, 1),
        (Scripted(KILLED, restarts=2, was_asked=True), 137, 1, 1),
        (Scripted(KILLED, RunError("no spare is fit"), restarts=2), 137, 1, 2),
    ],
    ids=[
        "well",
        "killed",
        "goes on",
        "out of restarts",
        "the user's mistake",
        "a mistake that was not told",
        "asked to stop",
        "no hosts left",
    ],
)
def test_a_run_is_started_as_often_as_makes_sense(
    supervisor: Scripted, code: int, reported: int, starts: int
) -> None:
    assert run(supervisor) == (code, reported)
    assert len(supervisor.started) == starts
    assert supervisor.started[0] == ["run.yaml"]
    assert all(words == ["run.yaml", "checkpoint.resume=auto"] for words in supervisor.started[1:])


def test_hosts_that_are_not_fit_at_first_are_the_users_to_mend() -> None:
    with pytest.raises(RunError, match="no spare is fit"):
        run(Scripted(RunError("no spare is fit"), restarts=2))
