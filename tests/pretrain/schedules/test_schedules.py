"""Every schedule, in hundreds of sizes: complete, in order, free of deadlocks, as fast and as small as theory says."""

import dataclasses
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.engine.schedules.catalogue import FORWARD_ONLY, SCHEDULES, make_schedule, schedule_fault
from pretrain.engine.schedules.check import PlanFault, check, faults
from pretrain.engine.schedules.ops import Kind, Op, Placement, Schedule, peak_live
from pretrain.engine.schedules.simulate import NotExecutable, Times, ideal, simulate
from pretrain.engine.schedules.streams import MODES, Deadlock, makespan
from pretrain.engine.schedules.transfers import Message, Plan, Receive, Send, lower
from pretrain.errors import RunError

CHUNKS = {"one": (1,), "two": (2,), "many": (2, 3, 4)}


def sizes() -> Iterator[tuple[str, int, int, int]]:
    """(name, stages, chunks, micro-batches): all legal ones up to 8 stages."""
    for name, family in SCHEDULES.items():
        for stages in (1, 2, 3, 4, 5, 6, 8):
            for chunks in CHUNKS[family.chunks]:
                for count in (1, 2, 3, stages, 2 * stages - 1, 2 * stages, 3 * stages + 1, 4 * stages):
                    if schedule_fault(name, stages=stages, chunks=chunks, num_micro_batches=count) is None:
                        yield name, stages, chunks, count


SIZES = sorted(set(sizes()))


def made(name: str, stages: int, chunks: int, count: int) -> Schedule:
    return make_schedule(name, stages=stages, chunks=chunks, num_micro_batches=count)


def test_there_are_hundreds_of_sizes() -> None:
    assert len(SIZES) > 300


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_size_passes_every_check(name: str) -> None:
    for size in (size for size in SIZES if size[0] == name):
        check(lower(made(*size)))


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("style", ["loop", "v"])
def test_evaluation_passes_every_check(chunks: int, style: str) -> None:
    if style == "v" and chunks != 2:
        return
    for stages in (1, 2, 3, 4):
        for count in (1, 2, 5, 8):
            check(lower(FORWARD_ONLY.make(Placement(stages, chunks, style), count)))  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 10**6), same=st.booleans())
def test_no_times_make_a_plan_deadlock(size: tuple[str, int, int, int], seed: int, same: bool) -> None:
    """Messages are ordered by expected times; whatever the real ones are, every mode comes to its end."""
    schedule, chance = made(*size), random.Random(seed)
    total = schedule.placement.total

    def some() -> Times:
        def row() -> tuple[float, ...]:
            return tuple(chance.uniform(0.1, 5.0) for _ in range(total))

        return Times(row(), row(), row(), transfer=chance.choice([0.0, 0.3, 3.0]))

    expected = some()
    plan = lower(schedule, expected)
    real = expected if same else some()
    ends = [makespan(plan, mode, real) for mode in MODES]
    assert ends[0] <= ends[3] + 1e-9, "messages that nobody waits for are no slower than those that block"


@pytest.mark.parametrize(("stages", "count"), [(2, 4), (3, 6), (4, 8), (4, 16), (6, 12)])
class TestTheory:
    """With F = I = W = 1 for a whole rank and B = 2; P stages, M micro-batches, v chunks."""

    def time(self, name: str, stages: int, chunks: int, count: int) -> float:
        schedule = made(name, stages, chunks, count)
        return simulate(schedule, Times.even(schedule.placement)).makespan

    def test_gpipe_and_1f1b(self, stages: int, count: int) -> None:
        """(M + P - 1)(F + B): Narayanan et al. 2021, section 2.2.1."""
        for name in ("gpipe", "1f1b", "eager"):
            assert self.time(name, stages, 1, count) == pytest.approx(3 * (count + stages - 1))

    @pytest.mark.parametrize("chunks", [2, 3, 4])
    def test_interleaved(self, stages: int, count: int, chunks: int) -> None:
        """The bubble divided by v: Narayanan et al. 2021, section 2.2.2."""
        time = self.time("interleaved", stages, chunks, count)
        assert time == pytest.approx(3 * count + 3 * (stages - 1) / chunks)

    def test_zb_h1(self, stages: int, count: int) -> None:
        """(P - 1)(F + I - W): Qi et al. 2023, table 1."""
        assert self.time("zb-h1", stages, 1, count) == pytest.approx(3 * count + stages - 1)

    def test_zb_v(self, stages: int, count: int) -> None:
        """Nothing but the way of the first micro-batch to the last rank: Qi et al. 2024."""
        assert self.time("zb-v", stages, 2, count) == pytest.approx(3 * count + (stages - 1) / 2)

    @pytest.mark.parametrize("chunks", [2, 3, 4])
    def test_interleaved_zb(self, stages: int, count: int, chunks: int) -> None:
        """The same: no flushing schedule is faster."""
        time = self.time("interleaved-zb", stages, chunks, count)
        assert time == pytest.approx(3 * count + (stages - 1) / chunks)


def test_stated_memory_is_what_is_held() -> None:
    for size in SIZES:
        schedule = made(*size)
        peaks = [peak_live(order) for order in schedule.orders]
        assert all(peak <= stated for peak, stated in zip(peaks, schedule.max_live, strict=True)), size
        if schedule.name in ("gpipe", "1f1b", "eager", "interleaved"):
            assert peaks == list(schedule.max_live), size


def test_zb_v_holds_what_1f1b_holds_at_most() -> None:
    for stages in (2, 4, 6):
        v = made("zb-v", stages, 2, 4 * stages)
        assert max(map(peak_live, v.orders)) == 2 * stages, "half-size activations of two chunks"


def hand_placed(schedule: Schedule) -> Plan:
    """Receives just before their use and sends just after their making, numbered as they are sent."""
    lowered = lower(schedule)
    receives = [
        {(step.what, step.chunk, step.micro_batch): step for step in program if isinstance(step, Receive)}
        for program in lowered.programs
    ]
    sends = [
        {(step.what, step.chunk, step.micro_batch): step for step in program if isinstance(step, Send)}
        for program in lowered.programs
    ]
    programs = []
    for rank, order in enumerate(schedule.orders):
        steps: list[Op | Message] = []
        for op in order:
            incoming = "activation" if op.kind == Kind.FORWARD else "gradient"
            outgoing = incoming
            if op.kind != Kind.WEIGHT and (incoming, op.chunk, op.micro_batch) in receives[rank]:
                steps.append(receives[rank][incoming, op.chunk, op.micro_batch])  # type: ignore[index]
            steps.append(op)
            if op.kind != Kind.WEIGHT and (outgoing, op.chunk, op.micro_batch) in sends[rank]:
                steps.append(sends[rank][outgoing, op.chunk, op.micro_batch])  # type: ignore[index]
        programs.append(tuple(steps))
    return Plan(schedule, tuple(programs))


@pytest.mark.parametrize("name", ["interleaved", "zb-v"])
@pytest.mark.parametrize("mode", ["pair", "batch", "blocking"])
def test_receives_placed_by_hand_deadlock(name: str, mode: str) -> None:
    """Why messages have one order for all: FINDINGS of a prototype, and PyTorch issues 172668 and 188833."""
    plan = hand_placed(made(name, 4, 2, 8))
    assert makespan(plan, "channel") > 0
    with pytest.raises(Deadlock, match=r"rank \d before"):
        makespan(plan, mode)  # type: ignore[arg-type]
    with pytest.raises(PlanFault, match="deadlock"):
        check(plan)


def without(plan: Plan, rank: int, place: int) -> Plan:
    program = plan.programs[rank]
    changed = list(plan.programs)
    changed[rank] = program[:place] + program[place + 1 :]
    return dataclasses.replace(plan, programs=tuple(changed))


def test_a_missing_message_is_found() -> None:
    plan = lower(made("1f1b", 4, 1, 8))
    for kind, half in ((Send, "sent"), (Receive, "received")):
        place = next(i for i, step in enumerate(plan.programs[1]) if isinstance(step, kind))
        assert any(f"is never {half}" in fault for fault in faults(without(plan, 1, place)))


def test_a_missing_operation_is_found() -> None:
    schedule = made("zb-h1", 4, 1, 8)
    orders = (schedule.orders[0][:-1], *schedule.orders[1:])
    plan = lower(dataclasses.replace(schedule, orders=orders))
    assert "rank 0 never does W7" in list(faults(plan))


def test_a_repeated_operation_is_found() -> None:
    schedule = made("1f1b", 2, 1, 4)
    orders = ((*schedule.orders[0], schedule.orders[0][-1]), schedule.orders[1])
    assert "rank 0 does B3 once too often" in list(
        faults(lower(dataclasses.replace(schedule, orders=orders)))
    )


def test_a_backward_before_its_forward_is_found() -> None:
    schedule = made("1f1b", 2, 1, 4)
    last = schedule.orders[1]
    swapped = dataclasses.replace(schedule, orders=(schedule.orders[0], (last[1], last[0], *last[2:])))
    assert any("before its forward half" in fault for fault in faults(lower(swapped)))


def test_more_memory_than_stated_is_found() -> None:
    schedule = dataclasses.replace(made("gpipe", 4, 1, 8), max_live=(4, 4, 4, 4))
    assert "rank 2 holds 8 activations at once, 4 are stated" in list(faults(lower(schedule)))


def test_one_activation_more_than_stated_is_found() -> None:
    schedule = made("1f1b", 4, 1, 8)
    stated = (schedule.max_live[0] - 1, *schedule.max_live[1:])
    found = list(faults(lower(dataclasses.replace(schedule, max_live=stated))))
    assert found == [f"rank 0 holds {schedule.max_live[0]} activations at once, {stated[0]} are stated"]


def test_messages_out_of_their_order_are_found() -> None:
    """Numbered in one order for all ranks: two that change places on one rank."""
    plan = lower(made("interleaved", 2, 2, 4))
    program = list(plan.programs[0])
    first, second = [i for i, step in enumerate(program) if not isinstance(step, Op)][-2:]
    program[first], program[second] = program[second], program[first]
    changed = dataclasses.replace(plan, programs=(tuple(program), *plan.programs[1:]))
    assert any(fault.startswith("rank 0 posts message") for fault in faults(changed))


def test_a_circle_of_waiting_is_named() -> None:
    schedule = made("1f1b", 2, 1, 2)
    first = schedule.orders[0]
    circle = dataclasses.replace(
        schedule, orders=((first[2], first[0], first[1], first[3]), schedule.orders[1])
    )
    with pytest.raises(NotExecutable, match="rank 0 waits for ever before B0"):
        simulate(circle)


@pytest.mark.parametrize(
    ("name", "chunks", "count", "message"),
    [
        (
            "1f1b",
            2,
            8,
            "layout.chunks=2 with layout.schedule=1f1b: it knows one chunk; use 1, or interleaved",
        ),
        ("interleaved", 1, 8, "use layout.chunks=2 or more, or 1f1b"),
        ("zb-v", 3, 8, "a V has two arms; use layout.chunks=2"),
        ("interleaved", 2, 10, "with 10 micro-batches: they pass in groups of layout.pp=4; use 8 or 12"),
        ("interleaved-zb", 2, 3, "use 4 (batch.accumulation_steps), or zb-h1 with layout.chunks=1"),
        ("1f1B", 1, 8, "layout.schedule=1f1B: unknown; did you mean 1f1b?"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_that_does(
    name: str, chunks: int, count: int, message: str
) -> None:
    with pytest.raises(RunError) as refused:
        make_schedule(name, stages=4, chunks=chunks, num_micro_batches=count)
    assert message in str(refused.value)


def test_the_bubble_is_the_share_of_waiting() -> None:
    schedule = made("1f1b", 4, 1, 8)
    timeline = simulate(schedule)
    assert timeline.bubble == pytest.approx(3 / 11)  # (P - 1) / (M + P - 1)
    assert ideal(Times.even(schedule.placement), schedule.placement, 8) == 24


def test_transfers_lengthen_1f1b_but_are_hidden_by_the_eager_form() -> None:
    plain, eager = made("1f1b", 4, 1, 32), made("eager", 4, 1, 32)
    times = Times.even(plain.placement, transfer=0.2)
    assert simulate(plain, times).makespan > simulate(eager, times).makespan + 8
