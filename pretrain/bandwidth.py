"""Measures how fast ranks talk: messages between every two hosts, and all-reduce over all; `megaloom doctor` starts it.

Pairs are measured in rounds, as in a tournament where everybody plays everybody: in each, every host has one partner,
so n hosts take n - 1 rounds and not n (n - 1) / 2 turns.  All ranks of a host send at once, each to its like on the
other.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from pretrain.engine.rendezvous import init_process_group

MIB = 1 << 20
SIZES_BYTES = {"cpu": (MIB, 16 * MIB), "cuda": (MIB, 16 * MIB, 256 * MIB)}
MESSAGE_BYTES = {"cpu": 4 * MIB, "cuda": 64 * MIB}
LONG_ENOUGH_S = 0.2
REPEATS, TRIES = 10, 3  # messages of a try at most, and tries


def rounds(num: int) -> Iterator[list[tuple[int, int]]]:
    """Every two of ``num`` once, in rounds of pairs that have nobody in common (the circle method)."""
    circle: list[int | None] = [*range(num), *([None] if num % 2 else [])]
    half = len(circle) // 2
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def parties(names: Sequence[str]) -> dict[str, list[int]]:
    """The ranks of each host, by its name; each rank is its own party where there is one host."""
    hosts: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        hosts.setdefault(name, []).append(rank)
    if len(hosts) > 1:
        return hosts
    return {f"rank {rank}": [rank] for rank in range(len(names))}


class Meter:
    """Clocks that mind what a device does in the background."""

    def __init__(self, device: torch.device):
        self.device = device

    def now_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def blank(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes // 4, device=self.device)

    def agree(self, number: int) -> int:
        """The same on all ranks: the least."""
        told = torch.tensor([number], device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MIN)
        return int(told.item())

    def all_reduce(self, num_bytes: int) -> float:
        """Bus bandwidth in GB/s: what each link carries, 2 (n - 1) / n of the data (nccl-tests, PERFORMANCE.md)."""
        data, n = self.blank(num_bytes), dist.get_world_size()
        dist.all_reduce(data)
        started_s = self.now_s()
        dist.all_reduce(data)
        one_s = self.now_s() - started_s
        repeats = self.agree(max(1, min(REPEATS, int(LONG_ENOUGH_S / one_s))))
        dist.barrier()
        started_s = self.now_s()
        for _ in range(repeats):
            dist.all_reduce(data)
        elapsed_s = (self.now_s() - started_s) / repeats
        return 2 * (n - 1) / n * num_bytes / elapsed_s / 1e9

    def send(self, target: int, num_bytes: int) -> float:
        """GB/s of several messages to ``target``, until it says that it has them."""
        data, answer = self.blank(num_bytes), self.blank(4)
        dist.send(data, target)  # the first one makes the connection
        dist.recv(answer, target)
        started_s = self.now_s()
        dist.send(data, target)
        dist.recv(answer, target)
        one_s = self.now_s() - started_s
        repeats = max(1, min(REPEATS, int(LONG_ENOUGH_S / one_s)))
        dist.send(answer.fill_(repeats), target)
        fastest_s = math.inf  # others at work disturb one try, a bad cable all of them
        for _ in range(TRIES):
            started_s = self.now_s()
            for _ in range(repeats):
                dist.send(data, target)
            dist.recv(answer, target)
            fastest_s = min(fastest_s, self.now_s() - started_s)
        return num_bytes * repeats / fastest_s / 1e9

    def receive(self, source: int, num_bytes: int) -> None:
        data, answer = self.blank(num_bytes), self.blank(4)
        for _ in range(2):
            dist.recv(data, source)
            dist.send(answer, source)
        dist.recv(answer, source)
        repeats = int(answer[0].item())
        for _ in range(TRIES):
            for _ in range(repeats):
                dist.recv(data, source)
            dist.send(answer, source)


def measure(meter: Meter, names: Sequence[str]) -> Iterator[dict[str, object]]:
    """All records, on every rank; rank 0 tells them."""
    kind, rank = meter.device.type, dist.get_rank()
    for num_bytes in SIZES_BYTES[kind]:
        yield {"bytes": num_bytes, "gb_per_s": meter.all_reduce(num_bytes)}
    by_name = parties(names)
    labels = list(by_name)
    for pairs in rounds(len(labels)):
        for is_back in (False, True):
            own: list[tuple[str, str, float]] = []
            for first, second in pairs:
                source, target = (second, first) if is_back else (first, second)
                both = zip(by_name[labels[source]], by_name[labels[target]], strict=False)
                for sender, receiver in both:
                    if rank == sender:
                        own.append(
                            (labels[source], labels[target], meter.send(receiver, MESSAGE_BYTES[kind]))
                        )
                    elif rank == receiver:
                        meter.receive(sender, MESSAGE_BYTES[kind])
            told: list[list[tuple[str, str, float]]] = [[] for _ in names]
            dist.all_gather_object(told, own)
            sums: dict[tuple[str, str], float] = {}
            for source_name, target_name, rate in (each for part in told for each in part):
                sums[source_name, target_name] = sums.get((source_name, target_name), 0.0) + rate
            for (source_name, target_name), rate in sums.items():
                yield {"source": source_name, "target": target_name, "gb_per_s": rate}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pretrain.bandwidth", description=__doc__)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--names", default="", help="each rank's host, with commas between")
    words = parser.parse_args(argv)
    world_size, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    init_process_group("nccl" if device.type == "cuda" else "gloo")
    names = words.names.split(",") if words.names else ["here"] * world_size
    for record in measure(Meter(device), names):
        if dist.get_rank() == 0:
            print(f"bandwidth {json.dumps(record)}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
