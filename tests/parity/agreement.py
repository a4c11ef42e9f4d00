"""How near a layout's trace must be to that of one process."""

from pretrain.parity import Trace, compare

TOLERANCE = 1e-5


def assert_same(trace: Trace | None, reference: Trace, tolerance: float = TOLERANCE) -> None:
    """Losses and norms of every step, gradients of the first, weights after the last."""
    assert trace is not None
    difference = compare(trace, reference)
    assert difference.loss <= tolerance, difference
    assert difference.grad_norm <= tolerance, difference
    assert difference.gradient <= 10 * tolerance, difference
    assert difference.weights <= 10 * tolerance, difference


def assert_alike(optimizer: str, trace: Trace, reference: Trace, *, loss: float = 1e-4) -> None:
    """The same, as near as the optimizer allows.

    Lion takes the sign of a difference of gradients: rounding flips single signs.  8-bit moments have a scale for each
    256 elements in a row, and a partition has other rows of 256: ``loss`` is their limit.
    """
    if optimizer == "AdamW8bit":
        difference = compare(trace, reference)
        assert difference.loss < loss and difference.weights < 1e-3 and difference.gradient < 1e-5, difference
        return
    assert_same(trace, reference, tolerance=1e-4 if optimizer == "Lion" else TOLERANCE)
