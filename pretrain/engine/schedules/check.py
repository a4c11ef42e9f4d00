"""A plan is refused here, or it runs: nothing missing or out of order, no deadlock, no more memory than stated."""

from collections import Counter
from collections.abc import Iterator

from pretrain.engine.schedules.ops import Kind, Op, Placement, peak_live
from pretrain.engine.schedules.simulate import NotExecutable, simulate, source
from pretrain.engine.schedules.streams import MODES, Deadlock, makespan
from pretrain.engine.schedules.transfers import Plan, Program, Receive, Send


class PlanFault(ValueError):
    """Why a plan must not run."""


def check(plan: Plan) -> None:
    """Look at everything that can be wrong with a plan.

    Raises:
        PlanFault: all that was found, a line each.
    """
    found = list(faults(plan))
    if found:
        raise PlanFault(f"schedule {plan.schedule.name}: " + "\n".join(found))


def faults(plan: Plan) -> Iterator[str]:
    yield from _incomplete(plan)
    yield from _too_many_live(plan)
    messages = list(_unpaired(plan))
    yield from messages
    for rank, program in enumerate(plan.programs):
        yield from _out_of_order(rank, program, plan.schedule.placement)
    if messages:
        return
    try:
        simulate(plan.schedule)
        for mode in MODES[:3]:  # nothing blocks the rank itself: the engine posts messages and goes on
            makespan(plan, mode)
    except (NotExecutable, Deadlock) as fault:
        yield f"deadlock: {fault}"


def _incomplete(plan: Plan) -> Iterator[str]:
    schedule = plan.schedule
    kinds = [Kind.FORWARD]
    if schedule.has_backward:
        kinds += [Kind.INPUT, Kind.WEIGHT] if schedule.splits_backward else [Kind.BACKWARD]
    wanted = Counter(
        Op(kind, chunk, micro_batch)
        for kind in kinds
        for chunk in range(schedule.placement.chunks)
        for micro_batch in range(schedule.num_micro_batches)
    )
    for rank, order in enumerate(schedule.orders):
        there = Counter(order)
        yield from (f"rank {rank} never does {op}" for op in wanted - there)
        yield from (f"rank {rank} does {op} once too often" for op in there - wanted)
        if tuple(step for step in plan.programs[rank] if isinstance(step, Op)) != order:
            yield f"rank {rank}: its program is not its order"


def _too_many_live(plan: Plan) -> Iterator[str]:
    schedule = plan.schedule
    if not schedule.has_backward:
        return
    for rank, (order, limit) in enumerate(zip(schedule.orders, schedule.max_live, strict=True)):
        peak = peak_live(order)
        if peak > limit:
            yield f"rank {rank} holds {peak} activations at once, {limit} are stated"


def _unpaired(plan: Plan) -> Iterator[str]:
    sends = {
        (step.number, rank, step.peer, step.what, step.micro_batch)
        for rank, program in enumerate(plan.programs)
        for step in program
        if isinstance(step, Send)
    }
    receives = {
        (step.number, step.peer, rank, step.what, step.micro_batch)
        for rank, program in enumerate(plan.programs)
        for step in program
        if isinstance(step, Receive)
    }
    for number, sender, receiver, what, micro_batch in sorted(sends ^ receives):
        half = "received" if (number, sender, receiver, what, micro_batch) in sends else "sent"
        yield f"the {what} of micro-batch {micro_batch} from rank {sender} to rank {receiver} is never {half}"


def _out_of_order(rank: int, program: Program, placement: Placement) -> Iterator[str]:
    """Every operation has what it needs by then, and messages keep to their numbers."""
    done: set[Op] = set()
    received: set[tuple[bool, int, int]] = set()
    last = -1
    for step in program:
        if isinstance(step, Op):
            yield from _needs(step, rank, placement, done, received)
            done.add(step)
            continue
        if step.number < last:
            yield f"rank {rank} posts message {step.number} after {last}"
        last = step.number
        if isinstance(step, Receive):
            received.add((step.what == "activation", step.chunk, step.micro_batch))
        else:
            makers = (Kind.FORWARD,) if step.what == "activation" else (Kind.BACKWARD, Kind.INPUT)
            if not any(Op(kind, step.chunk, step.micro_batch) in done for kind in makers):
                yield f"rank {rank} sends message {step.number} before it is made"


def _needs(
    op: Op, rank: int, placement: Placement, done: set[Op], received: set[tuple[bool, int, int]]
) -> Iterator[str]:
    before = {Kind.BACKWARD: Kind.FORWARD, Kind.INPUT: Kind.FORWARD, Kind.WEIGHT: Kind.INPUT}
    if op.kind in before and op._replace(kind=before[op.kind]) not in done:
        yield f"rank {rank} does {op} before its {before[op.kind].name.lower()} half"
    needs = source(op, rank, placement)
    if needs is None:
        return
    is_activation, stage, _ = needs
    if placement.rank(stage) != rank:
        is_there = (is_activation, op.chunk, op.micro_batch) in received
    else:  # handed over in memory
        makers = (Kind.FORWARD,) if is_activation else (Kind.BACKWARD, Kind.INPUT)
        is_there = any(Op(kind, placement.chunk(stage), op.micro_batch) in done for kind in makers)
    if not is_there:
        yield f"rank {rank} does {op} before its input is asked for"
