"""Bytes of an optimizer's own states on one rank, beside master weights: each kind as its code keeps them.

Most keep a number or two for each parameter, wherever that lies.  Four look at more: Muon at what is a hidden matrix,
Adafactor at rows and columns, 8-bit AdamW at blocks and at tensors that are too small for them, GaLore at both sides of
matrices and at which rows a partition has.  All of it is compared with what tensors take (tests/launch/test_light.py).
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate

from model_providers.tensor_shapes import TensorShape
from pretrain.engine.row_slices import Shape
from pretrain.optimizer_facts import BLOCK_ELEMENTS, MAP_ELEMENTS, OptimizerChoice, galore_shape

FP32 = 4
ALIGNMENT = 2  # elements of each copy's partition, deepspeed/runtime/zero/stage_1_and_2.py
# Numbers in fp32 for each parameter; another one of those below that have a momentum if asked.
NUMBERS = {
    "adam": 2, "adamw": 2, "lamb": 2, "radam": 2, "nadam": 2, "adamax": 2, "adadelta": 2, "rprop": 2,
    "lion": 1, "adagrad": 1, "rmsprop": 1, "asgd": 1, "sgd": 0,
}  # fmt: skip
MAY_HAVE_MOMENTUM = {"sgd", "rmsprop"}
BY_SHAPE = {"muon", "adafactor", "adamw8bit", "galore"}

Group = tuple[TensorShape, ...]


def bytes_per_parameter(choice: OptimizerChoice) -> int:
    """Of an optimizer that treats all parameters alike."""
    extra = choice.kind in MAY_HAVE_MOMENTUM and choice.has_momentum
    return FP32 * (NUMBERS[choice.kind] + extra)


@lru_cache(maxsize=4096)
def shaped_bytes(
    choice: OptimizerChoice, tensors: Group, *, zero_stage: int, copies: int, expert_copies: int | None = None
) -> int:
    """Of one that does not, on the rank that holds most.

    ``copies``: ranks that share a partition; ``expert_copies``: of experts, where others share those.
    """
    total = 0
    for experts in (False, True) if expert_copies is not None else (None,):
        mine = [one for one in tensors if experts is None or one.is_expert is experts]
        shared = expert_copies if experts and expert_copies is not None else copies
        for group in groups(choice, mine):
            total += _of_group(choice, group, zero_stage, shared)
    return total + (_maps(total) if choice.kind == "adamw8bit" else 0)


def groups(choice: OptimizerChoice, tensors: Iterable[TensorShape]) -> list[Group]:
    """As pretrain/optim.py makes them: those that are decayed and those that are not."""
    if not choice.decays:
        return [tuple(tensors)]
    decayed: dict[bool, list[TensorShape]] = {True: [], False: []}
    for one in tensors:
        decayed[one.is_matrix and (choice.decays_embeddings or not one.is_embedding)].append(one)
    return [tuple(group) for group in decayed.values() if group]


def _of_group(choice: OptimizerChoice, group: Group, zero_stage: int, copies: int) -> int:
    if choice.kind == "muon":
        hidden = tuple(one for one in group if one.is_hidden)
        others = tuple(one for one in group if not one.is_hidden)
        return FP32 * (_elements(hidden, zero_stage, copies) + 2 * _elements(others, zero_stage, copies))
    if choice.kind == "adafactor":
        return _of_adafactor(group, zero_stage)
    if choice.kind == "galore":
        return _of_galore(choice, group, zero_stage, copies)
    pieces = [one.elements for one in group] if zero_stage == 0 else [_elements(group, zero_stage, copies)]
    return sum(_in_8_bit(elements, choice.min_8bit_size) for elements in pieces)


def _elements(group: Group, zero_stage: int, copies: int) -> int:
    """Of a group on one rank: stages 1 and 2 cut all of it at once, stage 3 each tensor."""
    if zero_stage == 3:
        return sum(-(-one.elements // copies) for one in group)
    elements = sum(one.elements for one in group)
    return elements if zero_stage == 0 else -(-elements // (ALIGNMENT * copies)) * ALIGNMENT


def _in_8_bit(elements: int, smallest: int) -> int:
    """bitsandbytes: a byte for each of two moments, and an fp32 scale for each block of either."""
    if elements < smallest:
        return 2 * FP32 * elements
    return 2 * elements + 2 * FP32 * -(-elements // BLOCK_ELEMENTS)


def _maps(total: int) -> int:
    """Two tables of the numbers that 8 bits stand for, which all tensors share."""
    return 2 * FP32 * MAP_ELEMENTS if total else 0


def _of_adafactor(group: Group, zero_stage: int) -> int:
    """Rows and columns of every tensor on every rank; torch's own, without ZeRO, takes a vector as it is, and keeps a
    step in fp32 for each tensor.
    """
    total = 0
    for one in group:
        columns = one.lengths[-1]
        rows = one.elements // columns
        total += columns + (rows if one.is_matrix or zero_stage else 0) + (zero_stage == 0)
    return FP32 * total


def _of_galore(choice: OptimizerChoice, group: Group, zero_stage: int, copies: int) -> int:
    shapes = [
        galore_shape(one.lengths, choice.rank, is_hidden=one.is_hidden or choice.projects_embeddings)
        for one in group
    ]
    if zero_stage == 0:
        return FP32 * sum(_galore_numbers(shape, shape.rows, choice.rank) for shape in shapes)
    return FP32 * max(_galore_by_rank(shapes, _elements(group, zero_stage, copies), copies, choice.rank))


def _galore_by_rank(shapes: Sequence[Shape], partition: int, copies: int, rank: int) -> list[int]:
    """Numbers on each of the ranks that share the tensors; a row that is cut is on both."""
    found = [0] * copies
    for shape, end in zip(shapes, accumulate(shape.elements for shape in shapes), strict=True):
        start = end - shape.elements
        for place in range(start // partition, (end - 1) // partition + 1):
            begin, stop = max(start, place * partition) - start, min(end, (place + 1) * partition) - start
            rows = -(-stop // shape.columns) - begin // shape.columns
            found[place] += _galore_numbers(shape, rows, rank)
    return found


def _galore_numbers(shape: Shape, rows: int, rank: int) -> int:
    """Two moments of each row, and a basis; or two moments of each element."""
    return 2 * rows if shape.columns == 1 else 2 * rows * rank + shape.columns * rank
