"""GPipe, 1F1B, its eager form, interleaved 1F1B, and forward passes alone."""

from pretrain.engine.schedules.ops import Kind, Op, Order, Placement, Schedule

F, B = Kind.FORWARD, Kind.BACKWARD


def gpipe(placement: Placement, num_micro_batches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019, section 2.3)."""
    forwards = tuple(Op(F, 0, m) for m in range(num_micro_batches))
    backwards = tuple(Op(B, 0, m) for m in range(num_micro_batches))
    stages = placement.stages
    return Schedule(
        "gpipe", placement, num_micro_batches, (forwards + backwards,) * stages, (num_micro_batches,) * stages
    )


def one_f_one_b(placement: Placement, num_micro_batches: int) -> Schedule:
    """One forward, one backward: rank r holds P - r activations (Harlap et al. 2018; Narayanan et al. 2021, 2.2.1)."""
    warmups = [placement.stages - rank - 1 for rank in range(placement.stages)]
    return _alternating("1f1b", placement, num_micro_batches, warmups, group=1)


def eager_one_f_one_b(placement: Placement, num_micro_batches: int) -> Schedule:
    """1F1B with one forward more in flight per hop, which hides the time of transfers for as much more memory.

    Plain 1F1B has no slack: every hop there and back lengthens the steady period.
    """
    warmups = [2 * (placement.stages - rank - 1) for rank in range(placement.stages)]
    return _alternating("eager", placement, num_micro_batches, warmups, group=1)


def interleaved(placement: Placement, num_micro_batches: int) -> Schedule:
    """Interleaved 1F1B (Narayanan et al. 2021, section 2.2.2): the bubble shrinks by the number of chunks.

    Micro-batches pass in groups of P, a group through all chunks before the next one.
    """
    stages, chunks = placement.stages, placement.chunks
    warmups = [2 * (stages - rank - 1) + (chunks - 1) * stages for rank in range(stages)]
    return _alternating("interleaved", placement, num_micro_batches, warmups, group=stages)


def forward_only(placement: Placement, num_micro_batches: int) -> Schedule:
    """For evaluation: nothing is held."""
    group = placement.stages if placement.chunks > 1 else 1
    order = tuple(Op(F, c, m) for c, m in passes(num_micro_batches, placement.chunks, group))
    return Schedule(
        "forward", placement, num_micro_batches, (order,) * placement.stages, (len(order),) * placement.stages
    )


def passes(num_micro_batches: int, chunks: int, group: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in the order in which a rank runs its forwards."""
    return [
        (chunk, micro_batch)
        for first in range(0, num_micro_batches, group)
        for chunk in range(chunks)
        for micro_batch in range(first, min(first + group, num_micro_batches))
    ]


def _alternating(
    name: str, placement: Placement, num_micro_batches: int, warmups: list[int], *, group: int
) -> Schedule:
    """``warmups[rank]`` forwards, then forward and backward in turn, then the backwards that are left."""
    orders: list[Order] = []
    table = passes(num_micro_batches, placement.chunks, group)
    forwards = [Op(F, c, m) for c, m in table]
    backwards = [Op(B, placement.chunks - 1 - c, m) for c, m in table]
    for warmup in warmups:
        first = min(warmup, len(forwards))
        pairs = zip(forwards[first:], backwards, strict=False)
        steady = [op for pair in pairs for op in pair]
        orders.append((*forwards[:first], *steady, *backwards[len(forwards) - first :]))
    live = tuple(min(warmup + 1, len(forwards)) for warmup in warmups)
    return Schedule(name, placement, num_micro_batches, tuple(orders), live)
