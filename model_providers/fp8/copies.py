"""How long an eight-bit copy of a weight is good: one optimizer step, over all its micro-batches.

The engine says when a step begins and when it ends; between steps, in evaluation, and under ZeRO-3, where whole weights
do not stay, there is no step, and a copy is made for each product.
"""


class _State:
    number = 0
    is_open = False


def begin_step() -> None:
    """From now on weights stay as they are, until `end_step`."""
    _State.number, _State.is_open = _State.number + 1, True


def end_step() -> None:
    """The weights are about to change."""
    _State.is_open = False


def current() -> int | None:
    """The number of the step whose copies are good; None outside of steps."""
    return _State.number if _State.is_open else None
