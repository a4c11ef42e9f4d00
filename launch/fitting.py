"""Whether a layout fits a device: what `memory.py` counts, against what a device can give to tensors."""

from typing import NamedTuple

from launch.hardware import Cluster
from launch.memory import DeviceBytes, rank_memory
from launch.scenario import Scenario

# CUDA's context, NCCL's buffers and what an allocator cannot hand out again: a guess, and of small devices less.
GIB = 2.0**30
RESERVED_BYTES = 4 * GIB
RESERVED_AT_MOST = 0.25  # of the device


class Fit(NamedTuple):
    """Bytes on the fullest rank, on its device and its host, and what each has for them."""

    device: DeviceBytes
    host_bytes: float
    limit_bytes: float
    host_limit_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.device.total

    @property
    def fits(self) -> bool:
        return self.device.total <= self.limit_bytes and self.host_bytes <= self.host_limit_bytes

    @property
    def lack(self) -> str:
        """What it needs beyond what is there."""
        told = []
        if self.device.total > self.limit_bytes:
            told.append(f"{self.device.total / GIB:.1f} GiB of a device's {self.limit_bytes / GIB:.1f}")
        if self.host_bytes > self.host_limit_bytes:
            told.append(
                f"{self.host_bytes / GIB:.1f} GiB of a device's share of its host, {self.host_limit_bytes / GIB:.1f}"
            )
        return " and ".join(told)


def usable_bytes(cluster: Cluster) -> float:
    """What tensors may take of a device."""
    whole = cluster.device.memory_bytes
    return whole - min(RESERVED_BYTES, RESERVED_AT_MOST * whole)


def fits(scenario: Scenario, cluster: Cluster) -> Fit:
    """Of the rank that needs most on its device; hosts are shared by a node's ranks evenly.

    Where a rank does not fit, no further ones are looked at: the outer ranks, which hold most, come first.
    """
    fit = None
    for rank in sorted(range(scenario.layout.pp), key=lambda rank: min(rank, scenario.layout.pp - 1 - rank)):
        found = rank_memory(scenario, rank)
        one = Fit(found.device, found.cpu.total, usable_bytes(cluster), cluster.host_bytes)
        if fit is None or one.total_bytes > fit.total_bytes:
            fit = one._replace(host_bytes=max(one.host_bytes, fit.host_bytes if fit else 0.0))
        if not one.fits:
            return one
    assert fit is not None
    return fit
