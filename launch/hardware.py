"""What a cluster can do: devices and links by name, each number with where it is printed; or a small file of one's own.

Peaks are dense: datasheets of NVIDIA print twice as much, for matrices of which half is zero.  Links count one
direction of one device, datasheets both.  What programs reach of a peak is no fact of a datasheet: the two shares
of each device are fitted, see `Device`.
"""

import difflib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from model_providers.fp8.config import Recipe
from pretrain.config import Dtype
from pretrain.errors import RunError
from pretrain.run_file import read_yaml

GB = 1e9
GIB = 2.0**30


@dataclass(frozen=True)
class Device:
    """One device as its maker describes it, and two shares of its peak that were fitted.

    ``gemm_share``: of the 16-bit peak that large products keep up, before what their shapes lose (layer_time.py).  From
    Hopper on power is the limit rather than arithmetic, which is why it falls.
    ``attention_share``: of that peak in FlashAttention 2, forward and backward, of what a causal mask leaves (Dao 2023,
    arXiv:2307.08691, figure 4: 0.6 on an A100; section 4.1: 335 TFLOP/s on an H100).
    Those of A100, H100 and B200 are fitted on published steps, one pair for each device and none for a row
    (benchmarks/planner.py tells what is left); V100, MI250X and CPU have guesses.
    """

    name: str
    bf16_tflops: float  # dense; 0: has none
    fp16_tflops: float
    fp32_tflops: float  # without TF32, which torch leaves off
    fp8_tflops: float  # 0: has none
    memory_bytes: float
    memory_bytes_per_s: float
    num_cores: int  # streaming multiprocessors, or compute units: a product's tiles are dealt out to them
    gemm_share: float
    attention_share: float
    microscaled_tflops: float = 0.0  # in eight bits with a scale for each 16 or 32 numbers; 0: has none

    def fp8_flops_per_s(self, recipe: Recipe) -> float:
        """Of the printed peak; 0 where such products are emulated."""
        tflops = self.microscaled_tflops if recipe in ("mxfp8", "nvfp4") else self.fp8_tflops
        return tflops * 1e12

    def peak_flops_per_s(self, dtype: Dtype) -> float:
        tflops = {"bf16": self.bf16_tflops, "fp16": self.fp16_tflops, "fp32": self.fp32_tflops}[dtype]
        if tflops == 0:
            raise RunError(f"precision.dtype={dtype}: {self.name} computes no {dtype}; use fp16 or fp32")
        return tflops * 1e12


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind of device.  Bytes per second are of one device in one direction, as printed."""

    device: Device
    devices_per_node: int
    intra_bytes_per_s: float  # inside a node
    inter_bytes_per_s: float  # a device's share of its node's network
    intra_latency_s: float = 3.4e-6  # of one step of a ring: NCCL's src/graph/tuning.cc, NVLINK, Ring, Simple
    inter_latency_s: float = 14.0e-6  # the same: NET, Ring, Simple
    host_bytes_per_s: float = (
        25e9  # between a device and its host: PCIe 4.0 x16 reaches about 25 of its 32 GB/s
    )
    nvme_bytes_per_s: float = 3e9  # a device's share of local disks; a guess, disks differ
    host_bytes: float = 128 * GB  # a device's share of its host's memory; a guess: 1 TB for 8
    name: str = "cluster"

    def with_(self, **facts: Any) -> "Cluster":
        return replace(self, **facts)


# Memory of what is sold as 80 GB is 80 GiB, as nvidia-smi tells; B200 and H200 are counted as printed, a little less.
# NVIDIA A100 datasheet (2021): 312 TFLOP/s in bf16 and fp16, 19.5 in fp32; 108 SMs (GA100 whitepaper, table 4).
_A100_80GB = Device("A100-80GB", 312, 312, 19.5, 0, 80 * GIB, 2039 * GB, 108, 0.80, 0.55)
# NVIDIA H100 datasheet, SXM (2023): 1979 with sparsity in 16 bit, 3958 in fp8, 67 in fp32; 132 SMs.
_H100 = Device("H100", 989.4, 989.4, 67, 1978.9, 80 * GIB, 3350 * GB, 132, 0.62, 0.32)
DEVICES = {
    # NVIDIA V100 datasheet, SXM2 (2020): 125 TFLOP/s in fp16, 15.7 in fp32, no bf16; 80 SMs.
    "v100": Device("V100-32GB", 0, 125, 15.7, 0, 32 * GIB, 900 * GB, 80, 0.75, 0.30),
    "a100-40gb": replace(_A100_80GB, name="A100-40GB", memory_bytes=40 * GIB, memory_bytes_per_s=1555 * GB),
    "a100": _A100_80GB,
    "h100": _H100,
    # NVIDIA H200 datasheet (2024): an H100 with 141 GB at 4.8 TB/s.
    "h200": replace(_H100, name="H200", memory_bytes=141 * GB, memory_bytes_per_s=4800 * GB),
    # NVIDIA DGX B200 datasheet (2024), an eighth of it: 36 PFLOP/s in 16 bit with sparsity, 72 in fp8, 1440 GB,
    # 64 TB/s; 80 TFLOP/s in fp32 and 148 SMs (Blackwell architecture brief).
    "b200": Device("B200", 2250, 2250, 80, 4500, 180 * GB, 8000 * GB, 148, 0.47, 0.30, 4500),
    # AMD Instinct MI250X datasheet (2021), half of it, since each of its two dies is a device of its own: 383 TFLOP/s
    # in 16 bit, 95.7 in fp32 matrices, 128 GB, 3.2 TB/s, 220 compute units.
    "mi250x": Device("MI250X-GCD", 191.5, 191.5, 47.9, 0, 64 * GIB, 1600 * GB, 110, 0.55, 0.20),
    # A laptop's CPU: 8 cores x 3 GHz x 32 fp32 operations of AVX2 with FMA; two channels of DDR4-3200.
    "cpu": Device("CPU", 0.75, 0.75, 0.75, 0, 16 * GIB, 50 * GB, 8, 0.6, 0.3),
}
CLUSTERS = {
    # DGX-1V: six NVLink 2 links of 25 GB/s, 4 x 100 Gbit/s InfiniBand for 8 devices (NVIDIA DGX-1 datasheet).
    "v100": Cluster(DEVICES["v100"], 8, 150 * GB, 6.25 * GB, host_bytes_per_s=12 * GB, host_bytes=64 * GB),
    # DGX A100: NVLink 3 of 600 GB/s both ways, 8 x HDR InfiniBand of 200 Gbit/s (NVIDIA DGX A100 datasheet).
    "a100-40gb": Cluster(DEVICES["a100-40gb"], 8, 300 * GB, 25 * GB),
    "a100": Cluster(DEVICES["a100"], 8, 300 * GB, 25 * GB, host_bytes=256 * GB),
    # DGX H100: NVLink 4 of 900 GB/s both ways, 8 x 400 Gbit/s, PCIe 5 (NVIDIA DGX H100 datasheet).
    "h100": Cluster(DEVICES["h100"], 8, 450 * GB, 50 * GB, host_bytes_per_s=50 * GB, host_bytes=256 * GB),
    "h200": Cluster(DEVICES["h200"], 8, 450 * GB, 50 * GB, host_bytes_per_s=50 * GB, host_bytes=256 * GB),
    # DGX B200: NVLink 5 of 1.8 TB/s both ways, 8 x 400 Gbit/s (NVIDIA DGX B200 datasheet).
    "b200": Cluster(DEVICES["b200"], 8, 900 * GB, 50 * GB, host_bytes_per_s=50 * GB, host_bytes=256 * GB),
    # Frontier: eight dies a node, Infinity Fabric of 50 to 200 GB/s of which a ring takes the slowest, four Slingshot
    # ports of 200 Gbit/s (Atchley et al. 2023, doi:10.1145/3581784.3607089).
    "mi250x": Cluster(DEVICES["mi250x"], 8, 50 * GB, 12.5 * GB, host_bytes_per_s=36 * GB, host_bytes=64 * GB),
    # Processes of one machine talk through its memory.
    "cpu": Cluster(DEVICES["cpu"], 1, 5 * GB, 0.125 * GB, 50e-6, 100e-6, 50 * GB, 2 * GB, 16 * GB),
}
CLUSTERS = {name: replace(cluster, name=name) for name, cluster in CLUSTERS.items()}


def cluster_named(name: str, *, devices_per_node: int | None = None) -> Cluster:
    """A preset, or a file that describes a cluster; nodes of another size keep the links of each device."""
    path = Path(name)
    if name.lower() in CLUSTERS:
        cluster = CLUSTERS[name.lower()]
    elif path.suffix in (".yaml", ".yml", ".json"):
        cluster = read_cluster(path)
    else:
        near = difflib.get_close_matches(name.lower(), CLUSTERS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RunError(
            f"--device={name}: unknown; {hint}there are {', '.join(CLUSTERS)}, or give a .yaml or .json that describes "
            "yours"
        )
    if devices_per_node is None:
        return cluster
    if devices_per_node < 1:
        raise RunError(f"--gpus-per-node={devices_per_node}: a node has 1 device or more")
    return cluster.with_(devices_per_node=devices_per_node)


def read_cluster(path: Path) -> Cluster:
    """`{like: h100, devices_per_node: 4, inter_bytes_per_s: 25e9, device: {memory_bytes: 94e9}}`: a preset, changed."""
    raw = document_of(path)
    like = str(raw.pop("like", ""))
    if like not in CLUSTERS:
        raise RunError(
            f"{path}: like={like or 'null'}: name the preset it resembles, one of {', '.join(CLUSTERS)}"
        )
    device = raw.pop("device", {})
    if not isinstance(device, dict):
        raise RunError(f"{path}: device={device}: must be a section, such as {{memory_bytes: 94e9}}")
    cluster = CLUSTERS[like]
    known = replace(cluster.device, **_facts(path, "device.", Device, device))
    return replace(cluster, **{"name": path.stem, **_facts(path, "", Cluster, raw)}, device=known)


def document_of(path: Path) -> dict[str, Any]:
    if path.suffix != ".json":
        return read_yaml(path)
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as fault:
        raise RunError(f"{path}: not a cluster's description: {fault}") from None
    if not isinstance(raw, dict):
        raise RunError(f'{path}: must hold keys and values, such as {{"like": "h100"}}')
    return raw


def _facts(path: Path, prefix: str, kind: type, raw: dict[str, Any]) -> dict[str, Any]:
    """Checked values for ``kind``'s fields."""
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind) if field.name != "device"]
    facts = {}
    for key, value in raw.items():
        if key not in known:
            raise RunError(f"{path}: {prefix}{key}: no such key; there are {', '.join(known)}")
        if hints[key] is str:
            facts[key] = str(value)
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_whole = hints[key] is not int or value == int(value) if is_number else False
        if not is_number or not is_whole or not 0 < value < float("inf"):
            raise RunError(
                f"{path}: {prefix}{key}={value}: must be a{' whole' * (hints[key] is int)} number above 0"
            )
        if key.endswith("_share") and value > 1:
            raise RunError(f"{path}: {prefix}{key}={value}: a share of the peak is at most 1")
        facts[key] = hints[key](value)
    return facts
