"""The keeper of a rank: what it passes on, what it writes, and that the rank never outlives it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from launch.env import LOOPBACK, Place, exported, keeper_environment, place_of
from launch.keeper import LAUNCHER_IS_GONE
from launch.reports import Beat, Ended, Said, decode
from pretrain.monitor.heartbeat import Heartbeat, read
from tests.patience import patient_s

WAIT_S = 30


class Kept:
    """A keeper of a program that is written here."""

    def __init__(self, folder: Path, program: str, *words: str, before: tuple[str, ...] = ()):
        (folder / "program.py").write_text(textwrap.dedent(program), "utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": f"{folder}{os.pathsep}{Path.cwd()}",
            "MEGALOOM_LOGS": str(folder / "logs"),
            "RANK": "3",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "4",
            "LOCAL_SIZE": "2",
            "DS_ACCELERATOR": "cpu",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.keeper", *before, "program", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = folder / "logs" / "rank3.log"

    def messages(self) -> list[object]:
        """All of them, to the end."""
        out = self.process.communicate(timeout=patient_s(WAIT_S))[0]
        return [decode(line) for line in out.split("\n") if line]

    def hear(self) -> object:
        assert self.process.stdout is not None
        return decode(self.process.stdout.readline())

    def until_said(self, text: str) -> None:
        while not (isinstance(message := self.hear(), Said) and text in message.text):
            assert message is not None, self.process.communicate()

    def program(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child


def gone(process: psutil.Process) -> bool:
    deadline_s = time.monotonic() + patient_s(WAIT_S)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def test_what_a_rank_says_arrives_in_order_and_in_its_log(tmp_path: Path) -> None:
    kept = Kept(
        tmp_path,
        """
        import json, os, sys
        print(json.dumps([sys.argv[1:], os.environ["RANK"], os.environ["OMP_NUM_THREADS"]]))
        print("x" * 9000)
        print("no newline", end="", file=sys.stderr)
        sys.exit(5)
        """,
        "a b",
        "wrapped:WzAsMyw3XQ==",
        before=("--local_rank=1",),
    )
    messages = kept.messages()
    said = "".join(each.text for each in messages if isinstance(each, Said) and each.stream == "out")
    first, long, _ = said.split("\n")
    arguments, rank, threads = json.loads(first)
    assert arguments == ["--local_rank=1", "a b", "[0,3,7]"] and rank == "3" and int(threads) >= 1
    assert long == "x" * 9000
    assert Said(3, "err", "no newline") in messages
    ended = messages[-1]
    assert isinstance(ended, Ended) and (ended.rank, ended.code, ended.signal) == (3, 5, None)
    assert kept.process.returncode == 5
    log = kept.log.read_text()
    assert "x" * 9000 in log and "no newline" in log and "program" in log.splitlines()[0]


def test_a_signal_that_ends_a_rank_is_told(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    ended = kept.messages()[-1]
    assert isinstance(ended, Ended) and (ended.code, ended.signal) == (128 + signal.SIGSEGV, signal.SIGSEGV)


def test_heartbeats_are_passed_on(tmp_path: Path) -> None:
    kept = Kept(
        tmp_path,
        """
        import os, time
        from pretrain.monitor.heartbeat import Heartbeat
        beat = Heartbeat.of(os.environ)
        beat.begin_step(0); beat.begin_step(1); beat.doing("forward")
        time.sleep(2.5)
        """,
    )
    beats = [each for each in kept.messages() if isinstance(each, Beat)]
    assert beats and (beats[-1].step, beats[-1].doing, beats[-1].rank) == (1, "forward", 3)
    assert beats[-1].state in "SRD" and beats[-1].since_s > 0.5


def test_without_a_keeper_a_heartbeat_writes_nowhere(tmp_path: Path) -> None:
    Heartbeat.of({}).begin_step(3)
    with (tmp_path / "beats").open("w+b") as file:
        assert read(file.fileno()) is None
        Heartbeat(file.fileno()).doing("a very long story " * 50)
        told = read(file.fileno())
        assert told is not None and told.beats == 1 and told.doing.startswith("a very long story")


def test_phases_inside_an_evaluation_are_told_as_its_own(tmp_path: Path) -> None:
    import torch

    from pretrain.monitor.heartbeat import EVALUATES
    from pretrain.monitor.timers import PhaseTimers

    timers = PhaseTimers(torch.device("cpu"))
    with (tmp_path / "beats").open("w+b") as file:
        timers.heartbeat = Heartbeat(file.fileno())
        for inside in (True, False):
            with (
                timers.heartbeat.within(EVALUATES) if inside else contextlib.nullcontext(),
                timers.phase("forward"),
            ):
                told = read(file.fileno())
            assert told is not None and told.doing == ("evaluates: forward" if inside else "forward")


SLEEPER = """
    import signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("ready", child.pid, flush=True)
    while True: time.sleep(0.1)
    """


def test_a_first_signal_asks_and_a_second_one_ends(tmp_path: Path) -> None:
    kept = Kept(tmp_path, SLEEPER)
    kept.until_said("ready")
    program = kept.program()
    kept.process.send_signal(signal.SIGTERM)
    kept.until_said("asked to stop")
    assert program.is_running()
    grandchildren = program.children()
    kept.process.send_signal(signal.SIGTERM)
    assert kept.process.wait(WAIT_S) == 128 + signal.SIGKILL
    assert gone(program) and all(map(gone, grandchildren))


def test_a_rank_ends_when_nobody_reads_its_words_any_more(tmp_path: Path) -> None:
    """The launcher, or the connection to it, is gone."""
    kept = Kept(tmp_path, SLEEPER)
    kept.until_said("ready")
    program, grandchildren = kept.program(), kept.program().children()
    assert kept.process.stdout is not None
    kept.process.stdout.close()
    assert kept.process.wait(WAIT_S) == LAUNCHER_IS_GONE
    assert gone(program) and all(map(gone, grandchildren))
    assert "the connection to it, is gone" in kept.log.read_text()


def test_a_rank_dies_with_its_keeper(tmp_path: Path) -> None:
    kept = Kept(tmp_path, SLEEPER)
    kept.until_said("ready")
    program = kept.program()
    for child in program.children():
        child.kill()
    kept.process.kill()
    assert gone(program)
    kept.process.communicate()


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place()),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}, Place(5, 1, 8, 4)),
        (
            {f"OMPI_COMM_WORLD_{name}": str(n) for name, n in (("RANK", 3), ("LOCAL_RANK", 1), ("SIZE", 4))}
            | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            Place(3, 1, 4, 2),
        ),
        (
            {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16", "SLURM_NNODES": "2"},
            Place(9, 1, 16, 8),
        ),
    ],
)
def test_a_rank_knows_its_place_from_whoever_started_it(environment: dict[str, str], place: Place) -> None:
    assert place_of(environment) == place
    kept = keeper_environment({**environment, "MASTER_ADDR": "127.0.0.1"})
    assert [kept[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")] == [
        str(n) for n in place
    ]
    assert "GLOO_SOCKET_IFNAME" in kept


def test_on_one_machine_ranks_meet_on_loopback_whatever_their_launcher_says() -> None:
    """A batch script names the node, and torch and gloo would listen on its network."""
    here = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "node7"}
    kept = keeper_environment(here)
    loopback = {
        name for name, addresses in psutil.net_if_addrs().items() for a in addresses if a.address == LOOPBACK
    }
    assert kept["MASTER_ADDR"] == LOOPBACK
    assert {kept["GLOO_SOCKET_IFNAME"], kept["NCCL_SOCKET_IFNAME"]} == loopback
    assert keeper_environment({**here, "GLOO_SOCKET_IFNAME": "eth7"})["GLOO_SOCKET_IFNAME"] == "eth7"
    apart = keeper_environment({**here, "LOCAL_SIZE": "1", "MASTER_ADDR": "10.255.255.1"})
    assert apart["MASTER_ADDR"] == "10.255.255.1" and "NCCL_SOCKET_IFNAME" not in apart


def test_variables_of_the_libraries_travel_and_others_on_request() -> None:
    base = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1", "HOME": "/root", "MY_KEY": "x", "PYTHONPATH": "/p"}
    assert set(exported(base)) == {"NCCL_DEBUG", "OMP_NUM_THREADS", "PYTHONPATH"}
    assert "MY_KEY" in exported(base, ("MY_KEY",))
