"""The schedules by name, and what each asks of a layout."""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pretrain.engine.schedules import one_f_one_b, zero_bubble
from pretrain.engine.schedules.ops import Placement, Schedule
from pretrain.errors import RunError


@dataclass(frozen=True)
class Family:
    """How a schedule is made, and what it asks for."""

    make: Callable[[Placement, int], Schedule]
    chunks: Literal["one", "two", "many"]  # runs of layers per rank
    style: Literal["loop", "v"]
    in_groups: bool  # micro-batches must be a multiple of the stages
    help: str


SPLIT_BACKWARD = ("zb-h1", "zb-v", "interleaved-zb")  # whose weights' gradients wait
SCHEDULES = {
    "gpipe": Family(one_f_one_b.gpipe, "one", "loop", False, "all forwards, then all backwards; most memory"),
    "1f1b": Family(one_f_one_b.one_f_one_b, "one", "loop", False, "least memory"),
    "eager": Family(
        one_f_one_b.eager_one_f_one_b, "one", "loop", False, "1F1B that hides transfers, for twice its memory"
    ),
    "interleaved": Family(
        one_f_one_b.interleaved, "many", "loop", True, "1F1B over several chunks a rank: a smaller bubble"
    ),
    "zb-h1": Family(zero_bubble.zb_h1, "one", "loop", False, "1F1B, weight gradients in the bubble"),
    "zb-v": Family(
        zero_bubble.zb_v, "two", "v", False, "two chunks in a V: next to no bubble at 1F1B's memory"
    ),
    "interleaved-zb": Family(
        zero_bubble.interleaved_zb, "many", "loop", True, "interleaved, weight gradients in the bubble"
    ),
}
FORWARD_ONLY = Family(one_f_one_b.forward_only, "many", "loop", False, "evaluation")


def make_schedule(name: str, *, stages: int, chunks: int, num_micro_batches: int) -> Schedule:
    """The schedule ``name``.

    Raises:
        RunError: the first thing that does not fit, with the nearest that does.
    """
    fault = schedule_fault(name, stages=stages, chunks=chunks, num_micro_batches=num_micro_batches)
    if fault is not None:
        raise RunError(fault)
    return SCHEDULES[name].make(Placement(stages, chunks, SCHEDULES[name].style), num_micro_batches)


def schedule_fault(name: str, *, stages: int, chunks: int, num_micro_batches: int) -> str | None:
    """What speaks against the schedule; None if nothing."""
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return (
            f"layout.schedule={name}: unknown; {hint}there are {', '.join(SCHEDULES)}, and auto in a run file"
        )
    kind = SCHEDULES[name]
    if kind.chunks == "one" and chunks != 1:
        with_chunks = " or ".join(other for other, row in SCHEDULES.items() if row.chunks != "one")
        return (
            f"layout.chunks={chunks} with layout.schedule={name}: it knows one chunk; use 1, or {with_chunks}"
        )
    if kind.chunks == "two" and chunks != 2:
        return f"layout.chunks={chunks} with layout.schedule={name}: a V has two arms; use layout.chunks=2"
    if kind.chunks == "many" and chunks < 2:
        plain = "1f1b" if name == "interleaved" else "zb-h1"
        return f"layout.chunks={chunks} with layout.schedule={name}: use layout.chunks=2 or more, or {plain}"
    if kind.in_groups and num_micro_batches % stages:
        batches = "batch" if num_micro_batches == 1 else "batches"
        legal = sorted(
            {max(1, num_micro_batches // stages) * stages, math.ceil(num_micro_batches / stages) * stages}
        )
        return (
            f"layout.schedule={name} with {num_micro_batches} micro-{batches}: they pass in groups of "
            f"layout.pp={stages}; use {' or '.join(map(str, legal))} (batch.accumulation_steps), or "
            f"{'1f1b' if name == 'interleaved' else 'zb-h1'} with layout.chunks=1"
        )
    return None


def placement_of(name: str, *, stages: int, chunks: int) -> Placement:
    """Where the chunks of a schedule live."""
    return Placement(stages, chunks, SCHEDULES[name].style)
