"""`megaloom run --hostfile` for real: sshd, pdsh and the deepspeed launcher between namespaces, and what goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.nodes.network import Network, made, obstacle
from tests.parity.record import record_raw
from tests.patience import patient_s
from tests.ranks import RankPool
from tests.runs import tiny

WHY_NOT = obstacle()
pytestmark = [
    pytest.mark.nodes,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"needs network namespaces: {WHY_NOT}"),
]
WAIT_S = 120.0
SAVES_EVERY = 5  # steps
STEPS = 4


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    network = made(tmp_path_factory.mktemp("network"), 3)
    yield network
    network.close()


@pytest.fixture
def run_file(corpus: str, tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tiny(corpus, tmp_path / "out", **changes)), "utf-8")
        return path

    return write


class Launch:
    """A `megaloom run` on the login node, and what it has written."""

    def __init__(self, network: Network, run_file: Path, *words: str, cwd: str | None = None):
        command = [sys.executable, "-m", "launch", "run", str(run_file), *words]
        self._out = run_file.parent / "output.txt"
        with self._out.open("w") as out:
            self.process = network.start(command, stdout=out, stderr=subprocess.STDOUT, cwd=cwd)
        self.folder = run_file.parent / "out" / "tiny"

    @property
    def output(self) -> str:
        return self._out.read_text(errors="replace")

    def wait(self) -> int:
        try:
            return self.process.wait(patient_s(WAIT_S))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still at work:\n{self.output}") from None

    def until(self, what: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + patient_s(WAIT_S)
        while not what():
            assert self.process.poll() is None and time.monotonic() < deadline_s, self.output
            time.sleep(0.1)

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def restarts(self) -> int:
        return self.output.count("from the newest checkpoint")


def rank_process(network: Network, node: str) -> psutil.Process:
    """The rank's own program on a node that has one."""
    found = []
    for pid in network.processes(node):
        words = psutil.Process(pid).cmdline()
        if "pretrain.gpt" in words and words[words.index("-m") + 1] == "pretrain.gpt":
            found.append(psutil.Process(pid))
    (one,) = found
    return one


@pytest.mark.thorough
@pytest.mark.ranks
@pytest.mark.timeout(2 * WAIT_S)
def test_a_pipeline_across_nodes_trains_as_on_one(
    network: Network, ranks: RankPool, corpus: str, run_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Through pdsh; a word that a shell would read arrives as it was written."""
    changes = {"layout": {"pp": 2}, "train": {"steps": STEPS, "eval_samples": 8}}
    path = run_file(**changes)
    hostfile = network.hostfile("node1 slots=1", "node2 slots=1")
    launch = Launch(network, path, "--hostfile", hostfile, "--launcher", "pdsh", "layout.partition=[0,3,7]")
    assert launch.wait() == 0, launch.output
    assert "launch.py" not in launch.output and "on 2 hosts" in launch.output
    assert launch.steps() == STEPS
    changes["layout"] = {"pp": 2, "partition": [0, 3, 7]}
    trace = ranks.run(record_raw, 2, tiny(corpus, tmp_path / "here", **changes), STEPS)[0]
    records = [json.loads(line) for line in (launch.folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == pytest.approx(trace.losses, rel=1e-6)
    assert "node2" in (launch.folder / "logs" / "rank1.log").read_text()
    assert all(not network.processes(name) for name in network.names)


@pytest.mark.thorough
@pytest.mark.ranks
@pytest.mark.timeout(2 * WAIT_S)
def test_zero_3_across_a_bad_line_trains_as_on_a_good_one(
    network: Network, ranks: RankPool, corpus: str, run_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Through plain ssh; 20 ms of delay and one packet in a hundred lost make it slow, and nothing else."""
    network.slow_down("node2", delay_s=0.02, loss=0.01)
    changes = {"deepspeed": "zero3.json", "train": {"steps": STEPS, "eval_samples": 8}}
    hostfile = network.hostfile("node1 slots=2", "node2 slots=1")
    words = ("--hostfile", hostfile, "--launcher", "ssh", "--include", "node1:1@node2")
    launch = Launch(network, run_file(**changes), *words)
    try:
        assert launch.wait() == 0, launch.output
    finally:
        network.speed_up("node2")
    trace = ranks.run(record_raw, 2, tiny(corpus, tmp_path / "here", **changes), STEPS)[0]
    records = [json.loads(line) for line in (launch.folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == pytest.approx(trace.losses, rel=1e-6)


def stop_between_saves(launch: Launch, rank: psutil.Process) -> psutil.Process:
    """Rank 0, stopped; not while it saves, which the launcher gives twenty times as long."""
    while True:
        rank.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        if launch.steps() % SAVES_EVERY:
            return rank
        rank.send_signal(signal.SIGCONT)
        time.sleep(0.1)


@pytest.mark.ranks
@pytest.mark.timeout(3 * WAIT_S)
def test_a_run_survives_a_rank_a_hang_and_a_node(network: Network, run_file: Callable[..., Path]) -> None:
    """kill -9 of a rank, a rank that stops, a node without power, whose spare takes its place; then a signal."""
    path = run_file(layout={"pp": 2}, train={"steps": 100000}, checkpoint={"every": SAVES_EVERY})
    hostfile = network.hostfile("node1 slots=1", "node2 slots=1", "node3 slots=1 spare")
    supervised = ("--restarts", "3", "--pause", "0.1", "--stall-floor", "4", "--stall-factor", "3")
    launch = Launch(network, path, "--hostfile", hostfile, *supervised)
    launch.until(lambda: launch.steps() > 6)
    rank_process(network, "node2").kill()
    launch.until(lambda: launch.restarts() == 1)
    assert "rank 1 on node2 was killed (SIGKILL)" in launch.output

    launch.until(lambda: "resumed" in launch.output)
    before = launch.steps()
    launch.until(lambda: launch.steps() > before + 6)
    stopped = stop_between_saves(launch, rank_process(network, "node1"))
    launch.until(lambda: launch.restarts() == 2)
    assert "no step for" in launch.output
    assert f"rank 0 on node1 (process {stopped.pid})" in launch.output
    assert "its process is stopped" in launch.output

    launch.until(lambda: launch.output.count("resumed") == 2)
    before = launch.steps()
    launch.until(lambda: launch.steps() > before + 6)
    network.kill_node("node2")
    launch.until(lambda: launch.restarts() == 3)
    assert "node2 is lost, with rank 1" in launch.output
    launch.until(lambda: launch.output.count("resumed") == 3)
    assert "node3 takes the place of node2" in launch.output
    before = launch.steps()
    launch.until(lambda: launch.steps() > before + 2)

    os.kill(launch.process.pid, signal.SIGTERM)
    assert launch.wait() == 0, launch.output
    last = f"step-{launch.steps():07d}"
    assert (launch.folder / "checkpoints" / "latest").read_text().strip() == last
    steps = [json.loads(line)["step"] for line in (launch.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)), "no step is left out, and none told twice"
    assert all(not network.processes(name) for name in network.names)
    network.join("node2")
    network.start_sshd("node2")


def stale_python(network: Network) -> None:
    """The same interpreter, without this environment's packages; through a copy, since the path itself is hidden."""
    copy, script = network.folder / "python-without-packages", network.folder / "stale-python"
    shutil.copy(Path(sys.executable).resolve(), copy)
    script.write_text(f'#!/bin/sh\nPYTHONHOME={sys.base_prefix} exec {copy} "$@"\n', "utf-8")
    script.chmod(0o755)
    network.restart_sshd("node2", hide={sys.executable: script})


@pytest.mark.ranks
@pytest.mark.timeout(2 * WAIT_S)
def test_nothing_is_left_on_any_host_when_the_run_is_killed_outright(
    network: Network, run_file: Callable[..., Path]
) -> None:
    hostfile = network.hostfile("node1 slots=1", "node2 slots=1")
    launch = Launch(network, run_file(train={"steps": 100000}), "--hostfile", hostfile, "--launcher", "pdsh")
    launch.until(lambda: launch.steps() > 3)
    os.kill(launch.process.pid, signal.SIGKILL)
    launch.process.wait()
    deadline_s = time.monotonic() + patient_s(60)
    while any(network.processes(name) for name in network.names):
        assert time.monotonic() < deadline_s, "ranks go on without their launcher"
        time.sleep(0.2)


FAULTS = {
    "no-sshd": (lambda network: network.stop_sshd("node2"), "node2: no ssh server listens there"),
    "wrong-key": (
        lambda network: network.restart_sshd("node2", authorized="stranger.pub"),
        "node2: ssh refuses the key of this user",
    ),
    "stale-python": (stale_python, "node2: torch is none, and 2."),
    "unreachable": (lambda network: network.cut("node2"), "node2: it cannot be reached"),
}


@pytest.mark.timeout(WAIT_S)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_host_that_is_not_fit_is_told_before_ranks_start(
    network: Network, run_file: Callable[..., Path], fault: str
) -> None:
    spoil, message = FAULTS[fault]
    spoil(network)
    try:
        hostfile = network.hostfile("node1 slots=1", "node2 slots=1")
        launch = Launch(network, run_file(), "--hostfile", hostfile)
        assert launch.wait() == 2, launch.output
    finally:
        network.join("node2")
        if fault != "no-sshd":
            network.stop_sshd("node2")
        network.start_sshd("node2")
    assert message in launch.output, launch.output
    assert "Traceback" not in launch.output
    assert (
        "starting" not in launch.output
        and "node1:" not in launch.output
        and not (launch.folder / "logs").exists()
    )
