"""What the launcher makes of what it hears: who failed first, who is late, and what is shown."""

import io
from typing import Any

import pytest

from launch import watch as watching
from launch.report import CAUSES, Started, alone, cause_of, page
from launch.reports import Beat, Ended, Message, Said, decode, encode
from launch.watch import Failure, Watch

HOSTS = {0: "n1", 1: "n1", 2: "n2", 3: "n2"}


class Heard(Watch):
    """A watch over four ranks that keeps what it shows."""

    def __init__(self, **options: Any):
        self.out, self.err = io.StringIO(), io.StringIO()
        super().__init__(4, HOSTS, out=self.out, err=self.err, **options)

    def told(self, *messages: Message, prefix: str = "") -> "Heard":
        for message in messages:
            self.hear(prefix + encode(message).decode())
        return self


def beat(rank: int, *, step: int = 5, doing: str = "step", since_s: float = 30.0, state: str = "S") -> Beat:
    return Beat(rank, HOSTS[rank], 100 + rank, step, 0.5, doing, since_s, state)


@pytest.mark.parametrize(
    "message",
    [Said(3, "err", 'a "quoted" line\n\x1e\x00é'), beat(1), Ended(2, "n2", 137, 9), Ended(0, "n1", 0)],
)
def test_messages_survive_pipes_that_put_names_before_them(message: Message) -> None:
    line = encode(message).decode()
    assert line.count("\n") == 1 and line.endswith("\n")
    assert decode(line) == decode(f"node7: {line}") == message


@pytest.mark.parametrize("line", ["hello", "\x1e[", '\x1e["Nothing", 1]', '\x1e["Beat", 1]'])
def test_other_programs_words_and_broken_messages_are_no_messages(line: str) -> None:
    assert decode(line) is None


def test_output_is_shown_and_a_traceback_kept_for_the_end() -> None:
    heard = Heard().told(Said(0, "out", "step 1\n"), Said(1, "err", "warning: slow disk\n"))
    lines = ["Traceback (most recent call last):\n", '  File "x.py"\n', "ValueError: no\n"]
    heard.told(*(Said(1, "err", line) for line in lines), Ended(1, "n1", 1))
    assert heard.out.getvalue() == "step 1\n" and heard.err.getvalue() == "warning: slow disk\n"
    failure = heard.failure
    assert failure is not None and failure.words == tuple(lines) and failure.rank == 1
    assert alone(failure).splitlines() == [f"rank 1: {line.rstrip()}" for line in lines] + [
        "rank 1 on n1 ended with exit code 1"
    ]


def test_a_rank_that_only_tells_that_another_is_gone_is_not_the_first() -> None:
    """Its words may arrive before those of the rank that it lost."""
    heard = Heard()
    gone = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:5\n"
    heard.told(Said(0, "err", gone), Ended(0, "n1", 1), Ended(2, "n2", 137, 9))
    assert heard.err.getvalue() == "", "second-hand news is held back"
    assert heard.failure is not None
    assert heard.failure.what.startswith("rank 2 on n2 was killed (SIGKILL)") and heard.failure.rank == 2


def test_ranks_that_the_launcher_ends_have_not_failed() -> None:
    heard = Heard()
    heard.is_stopping = True
    assert heard.told(Ended(0, "n1", 137, 9)).failure is None


def test_what_many_ranks_refuse_is_shown_once_and_another_reason_too() -> None:
    heard = Heard()
    for rank in (1, 0, 3):
        heard.told(Said(rank, "err", "pretrain.gpt: layout.tp=3\n"), Ended(rank, HOSTS[rank], 2))
    heard.told(Said(2, "err", "pretrain.gpt: no disk\n"))
    assert heard.err.getvalue() == "pretrain.gpt: layout.tp=3\npretrain.gpt: no disk\n"
    assert heard.failure is not None and heard.failure.was_shown


def test_a_refusal_that_speaks_of_a_connection_is_shown() -> None:
    line = "pretrain.gpt: data.train=s3://x: Connection refused\n"
    heard = Heard().told(Said(1, "err", line), Ended(1, "n1", 2))
    assert heard.err.getvalue() == line
    assert heard.failure is not None and heard.failure.is_the_users and heard.failure.was_shown


def test_a_rank_that_ends_without_a_word_leaves_it_to_another_that_refuses() -> None:
    heard = Heard().told(Ended(1, "n1", 2))
    assert heard.failure is not None and not heard.failure.was_shown, "then its end is reported"
    heard.told(Said(0, "err", "pretrain.gpt: layout.tp=3\n"), Ended(0, "n1", 2))
    assert heard.failure.rank == 0 and heard.failure.was_shown


def test_a_launcher_that_ends_badly_when_all_ranks_are_done_is_no_failure() -> None:
    heard = Heard()
    heard.launcher_failed(1, "")
    for rank in range(4):
        heard.told(Ended(rank, HOSTS[rank], 0))
    heard.launcher_failed(137, "")
    assert heard.failure is None and heard.all_succeeded


def test_a_users_mistake_is_one() -> None:
    failure = Heard().told(Said(0, "err", "pretrain.gpt: layout.tp=3\n"), Ended(0, "n1", 2)).failure
    assert failure is not None and failure.is_the_users


def test_pdshs_word_of_a_lost_connection_is_understood() -> None:
    heard = Heard()
    heard.hear("pdsh@login: n2: ssh exited with exit code 1\n", is_error=True)
    assert heard.failure is None, "that is its ranks' own code, which they tell better"
    heard.hear("pdsh@login: n2: ssh exited with exit code 255\n", is_error=True)
    assert heard.failure is not None and heard.failure.what.startswith("n2 is lost, with ranks 2 to 3")


def test_launchers_own_log_is_not_shown() -> None:
    heard = Heard()
    heard.hear("n1: [2026-01-01] [INFO] [launch.py:152:main] WORLD INFO DICT\n")
    heard.hear("something else\n")
    assert heard.out.getvalue() == "something else\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    return now


def stalled(clock: list[float], *beats: Beat, after_s: float = 50.0) -> str | None:
    heard = Heard(stall_factor=10.0, stall_floor_s=20.0).told(*(beat(rank) for rank in range(4)))
    clock[0] += after_s
    return heard.told(*beats).stall()


def test_a_run_that_does_no_step_names_who_is_late(clock: list[float]) -> None:
    assert stalled(clock, after_s=19.0) is None
    told = stalled(clock, beat(0), beat(1), beat(2, doing="forward"), beat(3))
    assert (
        told
        == "no step for 50 s after step 5; a step takes 0.5 s: rank 2 on n2 (process 102) is in forward since 30 s"
    )
    told = stalled(clock, beat(0), beat(1), beat(2), beat(3, state="T"))
    assert told is not None and told.endswith(
        "rank 3 on n2 (process 103) is in step since 30 s, and its process is stopped"
    )
    told = stalled(clock, beat(0), beat(1, step=4), beat(2), beat(3))
    assert told is not None and "rank 1 on n1" in told and "rank 0" not in told


def test_an_evaluation_that_goes_on_is_no_stall_and_one_that_hangs_is(clock: list[float]) -> None:
    """Engines tell their phases inside of it, pipelines each of their passes."""
    moving = [beat(rank, doing="evaluates: forward", since_s=0.2) for rank in range(4)]
    assert stalled(clock, *moving, after_s=5000.0) is None
    hanging = [beat(rank, doing="evaluates: forward", since_s=4990.0) for rank in range(4)]
    told = stalled(clock, *hanging, after_s=5000.0)
    assert told is not None and "(process 100) evaluates: forward since" in told


def test_what_looked_like_a_failure_is_shown_when_the_rank_ends_well() -> None:
    heard = Heard().told(Said(0, "err", "retrying: Connection refused\n"), Said(0, "err", "fine again\n"))
    assert heard.err.getvalue() == "fine again\n", "one line does not silence a rank"
    assert heard.told(Ended(0, "n1", 0)).err.getvalue().endswith("Connection refused\n")


def test_saving_and_evaluating_take_as_long_as_they_take(clock: list[float]) -> None:
    saving = [beat(rank, doing="saves a checkpoint") for rank in range(4)]
    assert stalled(clock, *saving) is None
    assert stalled(clock, *saving, after_s=500.0) is not None


def test_before_the_first_step_patience_is_long(clock: list[float]) -> None:
    heard = Heard(stall_factor=10.0, stall_floor_s=20.0)
    clock[0] += 800.0
    assert heard.stall() is None
    clock[0] += 200.0
    told = heard.stall()
    assert told is not None and "ranks 0 to 3 have not said a word" in told


def test_a_host_that_falls_silent_is_known(clock: list[float]) -> None:
    heard = Heard().told(*(beat(rank) for rank in range(4)))
    clock[0] += 10.0
    heard.told(beat(0), beat(1))
    assert heard.someone_is_silent and heard.silent_hosts() == []
    clock[0] += 15.0
    heard.told(beat(0), beat(1))
    assert heard.silent_hosts() == ["n2"]


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "the device's memory is full"),
        ("OSError: [Errno 28] No space left on device", "a disk is full"),
        ("CUDA error: uncorrectable ECC error encountered", "a GPU is damaged"),
        ("ncclSystemError: System call (e.g. socket, malloc)", "cannot reach each other"),
        ("ModuleNotFoundError: No module named 'apex'", "the environment differs"),
        ("ValueError: something of one's own", "not known to this list"),
    ],
)
def test_the_likely_cause_is_told(words: str, cause: str) -> None:
    failure = Failure("rank 1 on n1 ended with exit code 1", "n1", 1, 1, (words,))
    assert cause in cause_of(failure).cause


def test_every_cause_says_what_to_change() -> None:
    assert all(cause.cause and cause.change for cause in CAUSES)


def test_the_report_is_one_page() -> None:
    from datetime import datetime
    from pathlib import Path

    from launch.attempt import Outcome

    failure = Failure("rank 2 on n2 was killed (SIGKILL)", "n2", 2, 137, ("last words\n",) * 100, step=12)
    history = [
        Started(datetime(2026, 1, 1), ("n1", "n2"), Outcome(137, failure, False, 12, ("n2: gone",)))
    ] * 3
    text = page("first", history, num_steps=100, checkpoint="step-0000010", logs=Path("runs/first/logs"))
    assert len(text.splitlines()) < 66 and max(map(len, text.splitlines())) < 200
    for part in ("in 3 starts", "after step 12 of 100", "rank2.log", "step-0000010 is whole", "n2: gone"):
        assert part in text
