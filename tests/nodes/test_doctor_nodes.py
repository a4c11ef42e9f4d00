"""Doctor over hosts of namespaces: who does not answer, who differs, and who is slow, each by name."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes.network import Network, made, obstacle
from tests.patience import patient_s

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"{obstacle()}")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    network = made(tmp_path_factory.mktemp("network"), 3)
    yield network
    network.close()


def doctor(network: Network, *words: str) -> tuple[int, dict[str, Any]]:
    lines = [f"{name} slots=1" for name in network.names]
    command = [
        sys.executable,
        "-m",
        "launch",
        "doctor",
        "--hostfile",
        network.hostfile(*lines),
        "--json",
        *words,
    ]
    started = network.start(command)
    out, err = started.communicate(timeout=patient_s(200))
    assert out, err
    return started.returncode, json.loads(out)


def test_hosts_are_told_by_name(network: Network, tmp_path: Path) -> None:
    other = tmp_path / "hostfile.py"
    other.write_text("# another version\n")
    network.restart_sshd("node2", hide={str(Path("launch/hostfile.py").absolute()): other})
    network.restart_sshd("node3", authorized="stranger.pub")
    code, document = doctor(network, "--quick")
    network.restart_sshd("node2")
    network.restart_sshd("node3")
    broken = {each["host"]: each for each in document["findings"] if each["level"] == "broken"}
    assert code == 1 and set(broken) == {"node2", "node3"}
    assert broken["node2"]["said"].startswith("code is ") and broken["node2"]["fix"]
    assert "refuses the key" in broken["node3"]["said"] and broken["node3"]["fix"] == "ssh-copy-id node3"
    assert document["facts"].keys() == {"node1", "node2"}


def test_a_slow_host_is_named(network: Network) -> None:
    fault = network.limit("node3", "400mbit")
    if fault is not None:
        pytest.skip(f"tc cannot limit a link here: {fault}")
    code, document = doctor(network, "--quick", "--bandwidth", "--launcher", "ssh")
    slow = [
        each for each in document["findings"] if each["subject"] == "bandwidth" and each["level"] == "warning"
    ]
    assert code == 0 and "node3" in [each["host"] for each in slow]
    assert len(document["bandwidth"]["pairs"]) == 6
    assert any(each["said"].startswith("sends to every other at 0.0") for each in slow)


def test_a_folder_that_is_not_shared_is_told(network: Network, tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    code = f"""
from pathlib import Path
from launch.doctor import shared_folder
for finding in shared_folder(Path({str(shared / "run")!r}), ["node1", "node2"]):
    print(finding.level, finding.host, finding.said)
"""
    told = network.start([sys.executable, "-c", code]).communicate(timeout=patient_s(60))
    assert told[0].splitlines() == [f"ok {name} all see {shared / 'run'}" for name in ("node1", "node2")], (
        told
    )
    network.restart_sshd("node2", hide={str(shared): other})
    told = network.start([sys.executable, "-c", code]).communicate(timeout=patient_s(60))
    network.restart_sshd("node2")
    assert told[0] == f"broken node2 does not see what node1 writes to {shared / 'run'}\n", told
    assert not list(shared.iterdir()), "nothing is left"
