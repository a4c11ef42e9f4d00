"""Layers to pipeline stages: contiguous, never empty, the heaviest stage as light as can be."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from model_providers.errors import ModelError

METHODS = ("uniform", "parameters", "cost")


def partition(costs: Sequence[float], stages: int) -> list[int]:
    """Bounds ``[0, ..., len(costs)]`` of ``stages`` non-empty runs whose heaviest is as light as possible.

    Exact, by dynamic programming over prefixes.  With ``n`` layers before the last stage, its rivals move in
    opposite directions: the earlier stages grow with n and the last one shrinks.  The best n is where they
    cross, and that only moves right, so a stage takes one sweep.
    """
    layers = len(costs)
    _check(layers, stages)
    prefix = [0.0, *accumulate(float(cost) for cost in costs)]
    heaviest = list(prefix)  # of the first n layers on the stages so far, cut best
    cuts: list[list[int]] = []
    for stage in range(2, stages + 1):
        worst, cut = [0.0] * (layers + 1), [0] * (layers + 1)
        n = stage - 1
        for end in range(stage, layers + 1):
            while n + 1 < end and heaviest[n] < prefix[end] - prefix[n]:
                n += 1
            around = (max(n - 1, stage - 1), n)
            worst[end], cut[end] = min((max(heaviest[k], prefix[end] - prefix[k]), k) for k in around)
        heaviest = worst
        cuts.append(cut)
    bounds = [layers]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return [0, *reversed(bounds)]


def partition_by(
    method: str | Sequence[int], parameters: Sequence[float], costs: Sequence[float], stages: int
) -> list[int]:
    """Bounds by a named method, or the given bounds checked."""
    layers = len(costs)
    if isinstance(method, str):
        _check(layers, stages)
        if method not in METHODS:
            raise ModelError(
                f"partition={method}: unknown; choose one of {', '.join(METHODS)}, or a list of bounds"
            )
        return partition({"uniform": [1.0] * layers, "parameters": parameters, "cost": costs}[method], stages)
    return _checked_bounds(list(method), layers, stages)


def heaviest_stage(costs: Sequence[float], bounds: Sequence[int]) -> float:
    return max(sum(costs[start:end]) for start, end in pairwise(bounds))


def _check(layers: int, stages: int) -> None:
    if stages < 1:
        raise ModelError(f"pp={stages}: a pipeline has at least one stage")
    if stages > layers:
        raise ModelError(
            f"pp={stages}: only {layers} layers to share out, and no stage may be empty; "
            f"use pp={layers} or fewer"
        )


def _checked_bounds(bounds: list[int], layers: int, stages: int) -> list[int]:
    _check(layers, stages)
    rises = all(start < end for start, end in pairwise(bounds))
    if len(bounds) != stages + 1 or bounds[0] != 0 or bounds[-1] != layers or not rises:
        raise ModelError(
            f"partition={bounds}: needs {stages + 1} rising bounds from 0 to {layers} for pp={stages}, "
            f"such as {partition([1.0] * layers, stages)}"
        )
    return bounds
