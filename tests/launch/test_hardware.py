"""Devices and clusters: presets hold together, and files are read strictly."""

from pathlib import Path

import pytest

from launch.hardware import CLUSTERS, DEVICES, cluster_named
from pretrain.errors import RunError


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_preset_is_plausible(name: str) -> None:
    cluster = CLUSTERS[name]
    assert cluster.name == name and cluster.device is DEVICES[name]
    assert cluster.intra_bytes_per_s > cluster.inter_bytes_per_s
    assert 0 < cluster.device.attention_share < cluster.device.gemm_share < 1
    assert cluster.device.fp32_tflops <= cluster.device.fp16_tflops


def test_a_file_changes_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text(
        "like: h100\ndevices_per_node: 4\ninter_bytes_per_s: 25e9\ndevice: {memory_bytes: 94e9}\n"
    )
    cluster = cluster_named(str(file))
    assert (cluster.name, cluster.devices_per_node, cluster.device.memory_bytes) == ("ours", 4, 94e9)
    assert cluster.intra_bytes_per_s == CLUSTERS["h100"].intra_bytes_per_s
    file.with_suffix(".json").write_text('{"like": "a100", "inter_bytes_per_s": 1e9}')
    assert cluster_named(str(file.with_suffix(".json")), devices_per_node=2).devices_per_node == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("like: h1000", "like=h1000: name the preset it resembles"),
        ("{like: h100, speed: 3}", "speed: no such key; there are devices_per_node"),
        ("{like: h100, device: {gemm_share: 2}}", "device.gemm_share=2: a share of the peak is at most 1"),
        ("{like: h100, devices_per_node: 0}", "devices_per_node=0: must be a whole number above 0"),
        ("{like: h100, inter_bytes_per_s: fast}", "inter_bytes_per_s=fast: must be a number above 0"),
        ("{like: h100, device: 3}", "device=3: must be a section"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text(text)
    with pytest.raises(RunError, match=r"ours\.yaml") as refused:
        cluster_named(str(file))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_unknown_devices_are_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="did you mean h100"):
        cluster_named("h10")
    with pytest.raises(RunError, match="not a cluster's description"):
        cluster_named(str(tmp_path / "none.json"))
    with pytest.raises(RunError, match="--gpus-per-node=0"):
        cluster_named("h100", devices_per_node=0)
    with pytest.raises(RunError, match="V100-32GB computes no bf16"):
        DEVICES["v100"].peak_flops_per_s("bf16")
