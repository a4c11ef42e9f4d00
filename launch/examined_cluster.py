"""A cluster as `megaloom doctor --hostfile hosts --json` saw it: what hosts have, in place of what datasheets say."""

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.hardware import CLUSTERS, Cluster, cluster_named, document_of
from pretrain.errors import RunError

MIB = 2.0**20
# Of a device's name as NVIDIA's tools print it, the preset that it resembles; longer names first.
NAMES = {"H200": "h200", "H100": "h100", "B200": "b200", "A100": "a100", "V100": "v100", "MI250X": "mi250x"}


def described(name: str, *, devices_per_node: int | None = None) -> Cluster:
    """A preset, a file that describes a cluster, or what `megaloom doctor --json` wrote."""
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        document = document_of(path)
        if is_of_doctor(document):
            cluster = cluster_of(document, path)
            return cluster if devices_per_node is None else cluster.with_(devices_per_node=devices_per_node)
    return cluster_named(name, devices_per_node=devices_per_node)


def is_of_doctor(document: Mapping[str, Any]) -> bool:
    return {"hosts", "findings", "facts"} <= set(document)


def cluster_of(document: Mapping[str, Any], path: Path) -> Cluster:
    """Devices, their memory, nodes and the network between them; of a mixture what the weakest has.

    The network's rate is what was measured between hosts, else what the active InfiniBand ports are rated at.
    """
    facts: dict[str, Any] = dict(document["facts"])
    if not facts:
        raise RunError(f"{path}: no host was examined; mend what doctor found, and run it again")
    kinds = {host: _kind(path, host, seen) for host, seen in facts.items()}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{kind}: {number}" for kind, number in Counter(kinds.values()).items())
        raise RunError(f"{path}: hosts with different devices ({told}); plan for one kind (doctor --include)")
    known = CLUSTERS[next(iter(kinds.values()))]
    gpus = [seen["probe"]["gpus"] for seen in facts.values()]
    per_node = min(map(len, gpus)) or 1
    own: dict[str, Any] = {"devices_per_node": per_node, "name": path.stem}
    memories = [float(gpu["memory_mib"]) * MIB for here in gpus for gpu in here]
    hosts_bytes = [seen["examination"]["memory"]["total_bytes"] for seen in facts.values()]
    own["host_bytes"] = min(float(size or 0) for size in hosts_bytes) / per_node or known.host_bytes
    rate = _network_bytes_per_s(document, facts, per_node)
    if rate:
        own["inter_bytes_per_s"] = rate
    device = replace(known.device, memory_bytes=min(memories)) if memories else known.device
    return known.with_(device=device, **own)


def _kind(path: Path, host: str, seen: Mapping[str, Any]) -> str:
    gpus = seen["probe"]["gpus"]
    if not gpus:
        return "cpu"
    name = gpus[0]["name"].upper()
    found = next((preset for word, preset in NAMES.items() if word in name), None)
    if found is None:
        raise RunError(
            f"{path}: {host} has {gpus[0]['name']}, of which no preset is known; describe the cluster in a .yaml with "
            "`like: PRESET` and its own numbers"
        )
    return found


def _network_bytes_per_s(
    document: Mapping[str, Any], facts: Mapping[str, Any], per_node: int
) -> float | None:
    """A device's share."""
    pairs = (document.get("bandwidth") or {}).get("pairs") or []
    if pairs:
        return statistics.median(float(pair["gb_per_s"]) for pair in pairs) * 1e9
    rates = [
        sum(
            port["rate_gbit_per_s"] or 0
            for port in seen["examination"]["infiniband"]
            if port["state"] == "ACTIVE"
        )
        for seen in facts.values()
    ]
    return min(rates) * 1e9 / 8 / per_node or None
