"""A plan under messages that wait for each other: does it end, and when?

NCCL runs what it is given on streams, one thing after the other, and both ends of a message must have come to it.
``channel``: a stream for each direction and kind between two ranks, as gloo's and any asynchronous messages.
``pair``: one for both directions between two ranks (NCCL's isend and irecv).  ``batch``: one for the whole rank, on
which messages that are posted together go together (batch_isend_irecv).  ``blocking``: the same, one message at a time,
and the rank computes nothing meanwhile (DeepSpeed's own pipeline).
"""

from collections import defaultdict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from pretrain.engine.schedules.ops import Op
from pretrain.engine.schedules.simulate import Times, product, source
from pretrain.engine.schedules.transfers import Message, Plan, Program, Receive, Send, batches

Mode = Literal["channel", "pair", "batch", "blocking"]
MODES: tuple[Mode, ...] = ("channel", "pair", "batch", "blocking")


class Deadlock(ValueError):
    """Where every rank stands when none can go on."""


def makespan(plan: Plan, mode: Mode, times: Times | None = None) -> float:
    """When the last operation ends if each message takes ``times.transfer`` once both ends have come to it.

    Raises:
        Deadlock: some rank never ends.
    """
    return _Run(plan, mode, times or Times.even(plan.schedule.placement)).run()


@dataclass(eq=False)
class _Group:
    """Messages of one rank that go together."""

    rank: int
    messages: list[Message]
    issued: float
    started: float | None = None
    ended: float | None = None


@dataclass
class _Rank:
    steps: list[Op | list[Message]]
    place: int = 0
    clock: float = 0.0
    receives: dict[tuple[bool, int, int], int] = field(
        default_factory=dict
    )  # what an operation waits for -> number


class _Run:
    def __init__(self, plan: Plan, mode: Mode, times: Times):
        self.placement, self.mode, self.times = plan.schedule.placement, mode, times
        self.ranks = [_Rank(_steps(program, mode)) for program in plan.programs]
        for rank, program in zip(self.ranks, plan.programs, strict=True):
            for step in program:
                if isinstance(step, Receive):
                    rank.receives[step.what == "activation", step.chunk, step.micro_batch] = step.number
        self.made: dict[tuple[bool, int, int], float] = {}
        self.streams: dict[Hashable, deque[_Group]] = defaultdict(deque)
        self.groups: dict[tuple[int, int], _Group] = {}  # (rank, number)

    def run(self) -> float:
        awake = set(range(len(self.ranks)))
        while awake:
            touched: set[int] = set()
            for number in sorted(awake):
                self._go_on(number, touched)
            awake = touched
        stuck = [
            f"rank {number} before {_first(rank.steps[rank.place])}"
            for number, rank in enumerate(self.ranks)
            if rank.place < len(rank.steps)
        ]
        if stuck or any(self.streams.values()):
            raise Deadlock(f"{self.mode} messages: " + ("; ".join(stuck) or "messages are left"))
        return max(rank.clock for rank in self.ranks)

    def _go_on(self, number: int, touched: set[int]) -> None:
        rank = self.ranks[number]
        while rank.place < len(rank.steps):
            step = rank.steps[rank.place]
            if isinstance(step, Op):
                begin = self._input_is_there(step, number)
                if begin is None:
                    return
                stage = self.placement.virtual_stage(number, step.chunk)
                rank.clock = max(rank.clock, begin) + self.times.of(step.kind, stage)
                result = product(step, number, self.placement)
                if result is not None:
                    self.made[result] = rank.clock
            else:
                group = self._posted(number, step, touched)
                if self.mode == "blocking":
                    if group.ended is None:
                        return
                    rank.clock = max(rank.clock, group.ended)
            rank.place += 1

    def _input_is_there(self, op: Op, number: int) -> float | None:
        needs = source(op, number, self.placement)
        if needs is None:
            return 0.0
        received = self.ranks[number].receives.get((needs[0], op.chunk, op.micro_batch))
        if received is None:
            return self.made.get(needs)
        group = self.groups.get((number, received))
        return None if group is None else group.ended

    def _posted(self, number: int, messages: list[Message], touched: set[int]) -> _Group:
        known = self.groups.get((number, messages[0].number))
        if known is not None:
            return known
        group = _Group(number, messages, self.ranks[number].clock)
        for message in messages:
            self.groups[number, message.number] = group
        stream = self.streams[self._stream_of(group)]
        stream.append(group)
        if stream[0] is group:
            self._start(group, group.issued, touched)
        return group

    def _stream_of(self, group: _Group) -> Hashable:
        message = group.messages[0]
        if self.mode in ("batch", "blocking"):
            return group.rank
        if self.mode == "pair":
            return group.rank, message.peer
        return group.rank, message.peer, message.what, isinstance(message, Send)

    def _start(self, group: _Group, earliest: float, touched: set[int]) -> None:
        """The first of its stream starts, and may complete others; those let the next of their streams start."""
        begun = deque([(group, earliest)])
        while begun:
            group, earliest = begun.popleft()
            group.started = max(group.issued, earliest)
            for other in [group, *self._partners(group)]:
                end = self._end_of(other)
                if end is None or other.ended is not None:
                    continue
                other.ended = end
                touched.add(other.rank)
                stream = self.streams[self._stream_of(other)]
                stream.popleft()
                if stream:
                    begun.append((stream[0], end))

    def _partners(self, group: _Group) -> list[_Group]:
        ends = ((message.peer, message.number) for message in group.messages)
        return [self.groups[end] for end in ends if end in self.groups]

    def _end_of(self, group: _Group) -> float | None:
        partners = self._partners(group)
        starts = [part.started for part in (group, *partners)]
        if len(partners) < len(group.messages) or None in starts:
            return None
        return max(start for start in starts if start is not None) + self.times.transfer


def _steps(program: Program, mode: Mode) -> list[Op | list[Message]]:
    if mode == "batch":
        return list(batches(program))
    return [step if isinstance(step, Op) else [step] for step in program]


def _first(step: Op | list[Message]) -> Op | Message:
    return step if isinstance(step, Op) else step[0]
