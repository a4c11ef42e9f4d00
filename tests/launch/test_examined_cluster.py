"""What doctor saw becomes the cluster that plan and estimate are asked about."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.examined_cluster import described
from launch.hardware import CLUSTERS
from pretrain.errors import RunError


def host(
    name: str = "NVIDIA H100 80GB HBM3", *, gpus: int = 4, rate: int = 400, state: str = "ACTIVE"
) -> dict[str, Any]:
    gpu = {"name": name, "driver": "550", "memory_mib": "81559", "ecc_errors": "0"}
    ports = [
        {"port": f"mlx5_{n}/1", "state": state, "rate_gbit_per_s": rate, "link": "InfiniBand"}
        for n in range(4)
    ]
    return {
        "probe": {"gpus": [gpu] * gpus},
        "examination": {"memory": {"total_bytes": 2**40, "available_bytes": 2**39}, "infiniband": ports},
    }


def written(folder: Path, *hosts: dict[str, Any], pairs: list[dict[str, Any]] | None = None) -> str:
    facts = {f"n{number}": one for number, one in enumerate(hosts)}
    bandwidth = None if pairs is None else {"all_reduce": [], "pairs": pairs}
    path = folder / "seen.json"
    path.write_text(
        json.dumps({"hosts": list(facts), "findings": [], "facts": facts, "bandwidth": bandwidth})
    )
    return str(path)


def test_devices_memory_nodes_and_network_are_those_that_were_seen(tmp_path: Path) -> None:
    seen = described(written(tmp_path, host(), host(rate=200)))
    assert seen.devices_per_node == 4 and seen.device.memory_bytes == 81559 * 2**20
    assert seen.inter_bytes_per_s == pytest.approx(4 * 200e9 / 8 / 4), "the slowest host's"
    assert seen.host_bytes == 2**40 / 4
    assert seen.device.bf16_tflops == CLUSTERS["h100"].device.bf16_tflops


def test_what_was_measured_goes_before_what_ports_are_rated_at(tmp_path: Path) -> None:
    pairs = [
        {"source": "n0", "target": "n1", "gb_per_s": 31.0},
        {"source": "n1", "target": "n0", "gb_per_s": 33.0},
    ]
    assert described(written(tmp_path, host(), host(), pairs=pairs)).inter_bytes_per_s == pytest.approx(32e9)


def test_without_ports_the_presets_network_stays(tmp_path: Path) -> None:
    down = described(written(tmp_path, host(state="DOWN")))
    assert down.inter_bytes_per_s == CLUSTERS["h100"].inter_bytes_per_s
    assert described(written(tmp_path, host(gpus=0))).device.name == "CPU"


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ((), "no host was examined"),
        ((host(), host("NVIDIA A100-SXM4-80GB")), "hosts with different devices (h100: 1, a100: 1)"),
        ((host("NVIDIA T4"),), "n0 has NVIDIA T4, of which no preset is known"),
    ],
)
def test_what_cannot_be_planned_for_is_told(tmp_path: Path, hosts: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RunError) as refused:
        described(written(tmp_path, *hosts))
    assert message in str(refused.value)
