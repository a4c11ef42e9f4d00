"""Messages between ranks, in one order for all.

Every message gets a number by the simulated time at which it is made, and every rank posts its sends and receives by
these numbers, a receive ahead of the first operation that begins no earlier than the message exists.  So the message
with the smallest number that is not through can always go, whatever else blocks; receives placed by hand just before
their use deadlock as soon as messages wait for each other, as they do on NCCL.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pretrain.engine.schedules.ops import Op, Schedule
from pretrain.engine.schedules.simulate import Times, product, simulate

What = Literal["activation", "gradient"]


class Send(NamedTuple):
    """Give the result of (``chunk``, ``micro_batch``) to ``peer``."""

    what: What
    chunk: int
    micro_batch: int
    peer: int
    number: int

    def __str__(self) -> str:
        return f"send {self.what} {self.number} to rank {self.peer}"


class Receive(NamedTuple):
    """Get what (``chunk``, ``micro_batch``) of this rank needs from ``peer``."""

    what: What
    chunk: int
    micro_batch: int
    peer: int
    number: int

    def __str__(self) -> str:
        return f"receive {self.what} {self.number} from rank {self.peer}"


Message = Send | Receive
Program = tuple[Op | Message, ...]


@dataclass(frozen=True)
class Plan:
    """A schedule with its messages: what each rank does, from first to last."""

    schedule: Schedule
    programs: tuple[Program, ...]  # by rank


def lower(schedule: Schedule, times: Times | None = None) -> Plan:
    """Put the sends and receives into the orders, for the times that are expected."""
    timeline, placement = simulate(schedule, times), schedule.placement
    made = []  # time, rank, place in the rank's order, operation, receiving virtual stage
    for rank, order in enumerate(schedule.orders):
        for place, op in enumerate(order):
            result = product(op, rank, placement)
            if result is None:
                continue
            is_activation, here, _ = result
            there = here + 1 if is_activation else here - 1
            if 0 <= there <= placement.last and placement.rank(there) != rank:
                made.append((timeline.ends[rank][place], rank, place, op, there))
    made.sort(key=lambda item: item[:3])
    slots: list[dict[int, list[Message]]] = [defaultdict(list) for _ in schedule.orders]
    reached = [0] * len(schedule.orders)  # messages come in the order of time, so places only rise
    for number, (time, rank, place, op, there) in enumerate(made):
        is_activation = there > placement.virtual_stage(rank, op.chunk)
        what: What = "activation" if is_activation else "gradient"
        peer = placement.rank(there)
        slots[rank][place + 1].append(Send(what, op.chunk, op.micro_batch, peer, number))
        starts = timeline.starts[peer]
        while reached[peer] < len(starts) and starts[reached[peer]] < time - 1e-9:
            reached[peer] += 1
        receive = Receive(what, placement.chunk(there), op.micro_batch, rank, number)
        slots[peer][reached[peer]].append(receive)
    return Plan(
        schedule,
        tuple(tuple(_filled(order, slot)) for order, slot in zip(schedule.orders, slots, strict=True)),
    )


def _filled(order: tuple[Op, ...], slots: dict[int, list[Message]]) -> Iterator[Op | Message]:
    for place in range(len(order) + 1):
        yield from sorted(slots.get(place, ()), key=lambda message: message.number)
        if place < len(order):
            yield order[place]


def batches(program: Program) -> Iterator[Op | list[Message]]:
    """Operations, and between them the messages that are posted together."""
    run: list[Message] = []
    for step in program:
        if isinstance(step, Op):
            if run:
                yield run
                run = []
            yield step
        else:
            run.append(step)
    if run:
        yield run
