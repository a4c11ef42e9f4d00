"""How long a schedule takes, and where its ranks wait."""

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.engine.schedules.ops import Kind, Op, Placement, Schedule


@dataclass(frozen=True)
class Times:
    """Seconds, or any other unit: of each virtual stage for one micro-batch, and of one message."""

    forward: tuple[float, ...]
    input_gradient: tuple[float, ...]
    weight_gradient: tuple[float, ...]
    transfer: float = 0.0

    @classmethod
    def even(
        cls,
        placement: Placement,
        *,
        forward: float = 1.0,
        input_gradient: float = 1.0,
        weight_gradient: float = 1.0,
        transfer: float = 0.0,
    ) -> "Times":
        """Those of one rank's whole share of the layers, cut evenly into its chunks."""

        def cut(whole: float) -> tuple[float, ...]:
            return (whole / placement.chunks,) * placement.total

        return cls(cut(forward), cut(input_gradient), cut(weight_gradient), transfer)

    def of(self, kind: Kind, virtual_stage: int) -> float:
        if kind == Kind.FORWARD:
            return self.forward[virtual_stage]
        first, second = self.input_gradient[virtual_stage], self.weight_gradient[virtual_stage]
        return {Kind.INPUT: first, Kind.WEIGHT: second, Kind.BACKWARD: first + second}[kind]


class NotExecutable(ValueError):
    """An order in which a rank waits for what comes later in the order of the rank that it waits for."""


@dataclass(frozen=True)
class Timeline:
    """When each operation of each rank starts and ends."""

    schedule: Schedule
    starts: tuple[tuple[float, ...], ...]  # by rank, in the order of its operations
    ends: tuple[tuple[float, ...], ...]

    @property
    def makespan(self) -> float:
        return max(max(ends, default=0.0) for ends in self.ends)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time, from the first operation to the last of all, in which they wait."""
        work = sum(
            end - start
            for starts, ends in zip(self.starts, self.ends, strict=True)
            for start, end in zip(starts, ends, strict=True)
        )
        return 1 - work / (self.makespan * len(self.starts))


def simulate(schedule: Schedule, times: Times | None = None) -> Timeline:
    """Run the orders with messages that keep nobody from computing, each ``times.transfer`` under way.

    Raises:
        NotExecutable: naming the first rank that can never go on.
    """
    times = times or Times.even(schedule.placement)
    placement, orders = schedule.placement, schedule.orders
    finished: dict[tuple[bool, int, int], float] = {}  # (is forward, virtual stage, micro-batch)
    starts: list[list[float]] = [[] for _ in orders]
    ends: list[list[float]] = [[] for _ in orders]
    waiting: dict[tuple[bool, int, int], int] = {}  # what a rank waits for -> the rank
    ready = list(range(len(orders)))
    while ready:
        rank = ready.pop()
        while len(ends[rank]) < len(orders[rank]):
            op = orders[rank][len(ends[rank])]
            needs = source(op, rank, placement)
            if needs is not None and needs not in finished:
                waiting[needs] = rank
                break
            arrived = 0.0 if needs is None else finished[needs]
            if needs is not None and placement.rank(needs[1]) != rank:
                arrived += times.transfer
            start = max(ends[rank][-1] if ends[rank] else 0.0, arrived)
            starts[rank].append(start)
            ends[rank].append(start + times.of(op.kind, placement.virtual_stage(rank, op.chunk)))
            made = product(op, rank, placement)
            if made is not None:
                finished[made] = ends[rank][-1]
                if made in waiting:
                    ready.append(waiting.pop(made))
    for rank, order in enumerate(orders):
        if len(ends[rank]) < len(order):
            raise NotExecutable(f"rank {rank} waits for ever before {order[len(ends[rank])]}")
    return Timeline(schedule, tuple(map(tuple, starts)), tuple(map(tuple, ends)))


def product(op: Op, rank: int, placement: Placement) -> tuple[bool, int, int] | None:
    """What an operation makes for others: (is an activation, virtual stage, micro-batch)."""
    if op.kind == Kind.WEIGHT:
        return None
    return op.kind == Kind.FORWARD, placement.virtual_stage(rank, op.chunk), op.micro_batch


def source(op: Op, rank: int, placement: Placement) -> tuple[bool, int, int] | None:
    """The product that an operation needs besides this rank's earlier work; None if nothing."""
    here = placement.virtual_stage(rank, op.chunk)
    if op.kind == Kind.FORWARD:
        return None if here == 0 else (True, here - 1, op.micro_batch)
    if op.kind == Kind.WEIGHT or here == placement.last:
        return None
    return False, here + 1, op.micro_batch


def ideal(times: Times, placement: Placement, num_micro_batches: int) -> float:
    """No schedule is faster: the busiest rank's work alone."""

    def work(rank: int) -> float:
        stages = [placement.virtual_stage(rank, chunk) for chunk in range(placement.chunks)]
        return sum(times.of(kind, stage) for stage in stages for kind in (Kind.FORWARD, Kind.BACKWARD))

    return num_micro_batches * max(work(rank) for rank in range(placement.stages))


def slowed(times: Times, factors: Sequence[float]) -> Times:
    """The same with each virtual stage's computing ``factors[i]`` times as long."""

    def longer(kind: Sequence[float]) -> tuple[float, ...]:
        return tuple(time * factor for time, factor in zip(kind, factors, strict=True))

    return Times(
        longer(times.forward), longer(times.input_gradient), longer(times.weight_gradient), times.transfer
    )
