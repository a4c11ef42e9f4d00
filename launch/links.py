"""How long ranks talk: which links a group of them uses, and the time of a ring, an all-to-all and a message on them.

Ranks are numbered tensor fastest and pipeline slowest (model_providers/layout.py) and nodes are filled in that order,
so a group is told by its size and its stride.  Ranks of one node that talk to other nodes do so over all their network
ports at once, as NCCL's rings do.
"""

import math
from dataclasses import dataclass

from launch.hardware import Cluster

# What nccl-tests' bus bandwidth comes to for large messages: 230 to 240 GB/s of an A100's 300 in its node and 185 to
# 190 of a node's 200 between nodes; shares of other generations are alike.
INTRA_SHARE = 0.78
INTER_SHARE = 0.90


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other, the same number on each of their nodes."""

    size: int
    per_node: int
    intra_bytes_per_s: float  # what is reached, for each rank
    inter_bytes_per_s: float
    intra_latency_s: float
    inter_latency_s: float

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.size / self.per_node)

    @property
    def link(self) -> str:
        """Where most bytes go: none, intra or inter."""
        if self.size == 1:
            return "none"
        return "intra" if self.num_nodes == 1 else "inter"

    @property
    def bus_bytes_per_s(self) -> float:
        """Of each rank in a ring, whose slowest link sets the pace."""
        if self.num_nodes == 1:
            return self.intra_bytes_per_s
        across = self.per_node * self.inter_bytes_per_s
        return across if self.per_node == 1 else min(self.intra_bytes_per_s, across)

    @property
    def ring_latency_s(self) -> float:
        """Steps inside nodes and between them, one after the other."""
        between = self.num_nodes - 1
        return (self.size - 1 - between) * self.intra_latency_s + between * self.inter_latency_s

    @property
    def tree_latency_s(self) -> float:
        """Up a tree of nodes and down again (NCCL 2.4), inside each node along a chain."""
        depth = math.ceil(math.log2(self.num_nodes))
        return 2 * ((min(self.per_node, self.size) - 1) * self.intra_latency_s + depth * self.inter_latency_s)

    def gather_s(self, whole_bytes: float, *, messages: int = 1) -> float:
        """An all-gather of ``whole_bytes``, or a reduce-scatter of them, in so many pieces."""
        if self.size == 1:
            return 0.0
        return self.gather_bytes(whole_bytes) / self.bus_bytes_per_s + messages * self.ring_latency_s

    def gather_bytes(self, whole_bytes: float) -> float:
        """What each rank sends."""
        return whole_bytes * (self.size - 1) / self.size

    def all_reduce_s(self, whole_bytes: float, *, messages: int = 1) -> float:
        """A reduce-scatter and an all-gather; NCCL takes a tree where a ring is too long."""
        if self.size == 1:
            return 0.0
        latency_s = min(2 * self.ring_latency_s, self.tree_latency_s)
        return 2 * self.gather_bytes(whole_bytes) / self.bus_bytes_per_s + messages * latency_s

    def all_to_all_s(self, sent_bytes: float) -> float:
        """Each rank sends ``sent_bytes``, its own part included, evenly to all; both links at the same time."""
        if self.size == 1:
            return 0.0
        inside = (min(self.per_node, self.size) - 1) / self.size
        across = max(0.0, (self.size - self.per_node) / self.size)
        busy_s = max(
            inside * sent_bytes / self.intra_bytes_per_s, across * sent_bytes / self.inter_bytes_per_s
        )
        return busy_s + (self.inter_latency_s if across else self.intra_latency_s)


def group(cluster: Cluster, *, size: int, stride: int = 1) -> Group:
    """``size`` ranks, each ``stride`` after the one before."""
    return Group(
        size,
        min(size, max(1, cluster.devices_per_node // stride)),
        cluster.intra_bytes_per_s * INTRA_SHARE,
        cluster.inter_bytes_per_s * INTER_SHARE,
        cluster.intra_latency_s,
        cluster.inter_latency_s,
    )


def message_s(cluster: Cluster, sent_bytes: float, *, world_size: int) -> float:
    """From one pipeline stage to the next; the slowest border counts, and it lies between nodes if there are two."""
    if world_size <= cluster.devices_per_node:
        return cluster.intra_latency_s + sent_bytes / (cluster.intra_bytes_per_s * INTRA_SHARE)
    return cluster.inter_latency_s + sent_bytes / (cluster.inter_bytes_per_s * INTER_SHARE)
