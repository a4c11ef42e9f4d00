"""The learning rate as a pure function of the step, and which parameters are decayed.

Nothing here keeps state: the trainer sets every step's learning rate from the step's number, so a resumed run
needs no scheduler state and cannot drift from an uninterrupted one.
"""

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

from pretrain.config import (
    ConstantSchedule,
    CosineSchedule,
    InverseSquareRootSchedule,
    LinearSchedule,
    OptimizerConfig,
    PowerSchedule,
    Schedule,
    WSDSchedule,
)

DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}


def learning_rate_factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (0 is the first) over the peak, in [0, 1].

    ``num_steps`` is the run's length; a schedule's own ``total_steps`` goes before it.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    total = getattr(schedule, "total_steps", None) or num_steps
    match schedule:
        case ConstantSchedule():
            return 1.0
        case CosineSchedule():
            return _fall(
                schedule.min_factor, DECAY_SHAPES["cosine"](_progress(step, schedule.warmup_steps, total))
            )
        case LinearSchedule():
            return _fall(
                schedule.min_factor, DECAY_SHAPES["linear"](_progress(step, schedule.warmup_steps, total))
            )
        case WSDSchedule():
            progress = _progress(step, total - schedule.decay_steps, total)
            return _fall(schedule.min_factor, DECAY_SHAPES[schedule.decay_shape](progress))
        case InverseSquareRootSchedule():
            return math.sqrt(schedule.warmup_steps / (step + 1))
        case PowerSchedule():
            power = ((step + 1) / schedule.warmup_steps) ** schedule.exponent
            return power * (
                1 - _progress(step, total - schedule.decay_steps, total) if schedule.decay_steps else 1.0
            )


def _progress(step: int, start: int, end: int) -> float:
    """0 up to ``start``, 1 at the last step before ``end`` and after."""
    return min(1.0, max(0.0, (step + 1 - start) / max(1, end - start)))


def _fall(lowest: float, height: float) -> float:
    return lowest + (1 - lowest) * height


def parameter_groups(
    named: Iterable[tuple[str, Any]], optimizer: OptimizerConfig, tied: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Two groups: matrices, which are decayed, and norms and biases, which are not; one if nothing is decayed.

    ``tied``: names of what is tied to the embedding, an embedding on whatever rank it stands.  Under
    ZeRO-3 a parameter's own shape is that of its shard, so the whole one (``ds_shape``) decides.
    """
    if optimizer.weight_decay == 0:
        return [{"params": [parameter for _, parameter in named], "weight_decay": 0.0}]
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in named:
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        is_embedding = name.startswith("embedding.") or name in tied
        groups[is_matrix and (optimizer.decay_embeddings or not is_embedding)].append(parameter)
    return [
        {"params": groups[True], "weight_decay": optimizer.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
