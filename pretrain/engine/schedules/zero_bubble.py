"""Schedules that fill the bubble with weight gradients, which nobody waits for."""

import heapq
from collections import Counter, deque

from pretrain.engine.schedules.one_f_one_b import interleaved, one_f_one_b
from pretrain.engine.schedules.ops import Kind, Op, Order, Placement, Schedule

F, I, W = Kind.FORWARD, Kind.INPUT, Kind.WEIGHT  # noqa: E741


def zb_h1(placement: Placement, num_micro_batches: int) -> Schedule:
    """ZB-H1 (Qi et al. 2023, section 2.3.1): 1F1B with weight gradients held back, at 1F1B's largest memory.

    Rank r lets r of them pile up and computes them in the bubble at the end, which shrinks to (P-1)(F+I-W).
    """
    stages = placement.stages
    orders = []
    for rank, order in enumerate(one_f_one_b(placement, num_micro_batches).orders):
        ops: list[Op] = []
        held: deque[Op] = deque()
        for op in order:
            if op.kind == F:
                ops.append(op)
                continue
            ops.append(op._replace(kind=I))
            held.append(op._replace(kind=W))
            if len(held) > rank:
                ops.append(held.popleft())
        orders.append((*ops, *held))
    return Schedule(
        "zb-h1", placement, num_micro_batches, tuple(orders), (min(stages, num_micro_batches),) * stages
    )


def zb_v(placement: Placement, num_micro_batches: int) -> Schedule:
    """ZB-V (Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", figure 1): no bubble but filling.

    That holds when the three kinds take equally long and there are 2P - 1 micro-batches; at 1F1B's memory on every
    rank.  Fewer micro-batches follow the order of enough of them, with the surplus left out.
    """
    stages = placement.stages
    enough = max(2 * stages - 1, num_micro_batches)
    orders = tuple(
        tuple(op for op in _v_order(stages, rank, enough) if op.micro_batch < num_micro_batches)
        for rank in range(stages)
    )
    return Schedule("zb-v", placement, num_micro_batches, orders, (2 * stages,) * stages)


def _v_order(stages: int, rank: int, num_micro_batches: int) -> list[Op]:
    done: Counter[tuple[Kind, int]] = Counter()
    ops: list[Op] = []

    def put(*steps: tuple[Kind, int], times: int = 1) -> None:
        for kind, chunk in steps * times:
            ops.append(Op(kind, chunk, done[kind, chunk]))
            done[kind, chunk] += 1

    down, up = ((F, 0), (I, 0), (W, 0)), ((F, 1), (I, 1), (W, 1))
    put(down[0], times=2 * (stages - rank) - 1)
    put(up[0], down[0], times=rank)
    put(*up, times=stages - rank)
    while done[up[0]] < done[down[0]] or done[down[0]] < num_micro_batches:
        if done[down[0]] < num_micro_batches:
            put(down[0])
        put(down[1], down[2], *up)
    put(down[1], up[1], times=rank)
    put(down[1], down[2], times=stages - rank)
    put(up[2], times=done[up[1]] - done[up[2]])
    put(down[2], times=done[down[1]] - done[down[2]])
    assert set(done.values()) == {num_micro_batches}, done
    return ops


def interleaved_zb(placement: Placement, num_micro_batches: int) -> Schedule:
    """Interleaved 1F1B whose weight gradients wait for idle moments, within its own largest memory."""
    plain = interleaved(placement, num_micro_batches)
    limits = (max(plain.max_live),) * placement.stages
    orders = _with_weights_in_the_gaps(plain, limits)
    return Schedule("interleaved-zb", placement, num_micro_batches, orders, limits)


def _with_weights_in_the_gaps(plain: Schedule, limits: tuple[int, ...]) -> tuple[Order, ...]:
    """Keep each rank's order of forwards and backwards; put a weight half where the rank would idle, all taking 1.

    Ranks are walked in the order of their clocks.  A forward that would exceed the rank's limit of live activations
    makes it compute a weight half first.
    """
    placement, stages = plain.placement, plain.placement.stages
    finished: dict[tuple[bool, int, int], int] = {}  # (is forward, virtual stage, micro-batch) -> time
    place, live = [0] * stages, [0] * stages
    held: list[deque[Op]] = [deque() for _ in range(stages)]
    orders: list[list[Op]] = [[] for _ in range(stages)]
    clocks = [(0, rank) for rank in range(stages)]
    heapq.heapify(clocks)
    while clocks:
        now, rank = heapq.heappop(clocks)
        op = plain.orders[rank][place[rank]] if place[rank] < len(plain.orders[rank]) else None
        is_due = op is not None and _is_ready(op, rank, now, finished, placement)
        is_full = op is not None and op.kind == F and live[rank] >= limits[rank]
        if op is not None and is_due and not (is_full and held[rank]):
            virtual_stage = placement.virtual_stage(rank, op.chunk)
            finished[op.kind == F, virtual_stage, op.micro_batch] = now + 1
            place[rank] += 1
            if op.kind == F:
                live[rank] += 1
                orders[rank].append(op)
            else:
                orders[rank].append(op._replace(kind=I))
                held[rank].append(op._replace(kind=W))
        elif held[rank]:
            orders[rank].append(held[rank].popleft())
            live[rank] -= 1
        elif op is None:
            continue
        heapq.heappush(clocks, (now + 1, rank))
    return tuple(map(tuple, orders))


def _is_ready(
    op: Op, rank: int, now: int, finished: dict[tuple[bool, int, int], int], placement: Placement
) -> bool:
    here = placement.virtual_stage(rank, op.chunk)
    if op.kind == F:
        return here == 0 or finished.get((True, here - 1, op.micro_batch), now + 1) <= now
    before = (True, here, op.micro_batch) if here == placement.last else (False, here + 1, op.micro_batch)
    return finished.get(before, now + 1) <= now
