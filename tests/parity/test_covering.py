"""Every pair of features computes, in some layout, what one process does: the cells of `covering.json`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.parity import Trace, compare
from tests.parity.covering import (
    Cell,
    completed,
    name,
    num_ranks,
    pairs,
    pairs_of,
    raw_run,
    read,
    reference,
    refusal,
)
from tests.parity.record import record_raw
from tests.parity.test_layouts import assert_same
from tests.ranks import RankPool

STEPS = 3
CELLS = read()


@pytest.fixture(scope="module")
def trace_of(
    ranks: RankPool, corpus: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Cell], Trace]:
    """The trace of a cell, kept."""
    kept: dict[str, Trace] = {}
    out = tmp_path_factory.mktemp("cells")

    def trace(cell: Cell) -> Trace:
        key = name(cell)
        if key not in kept:
            kept[key] = ranks.run(record_raw, num_ranks(cell), raw_run(cell, corpus, out), STEPS)[0]
        return kept[key]

    return trace


@pytest.mark.ranks
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_cell_computes_what_one_process_does(trace_of: Callable[[Cell], Trace], cell: Cell) -> None:
    trace, wanted = trace_of(cell), trace_of(reference(cell))
    difference = compare(trace, wanted)
    if cell["precision"] == "bf16":  # as test_bf16_is_the_same_in_every_schedule
        assert trace.losses == pytest.approx(wanted.losses, rel=2e-3), difference
        assert trace.grad_norms == pytest.approx(wanted.grad_norms, rel=2e-2), difference
    elif cell["optimizer"] == "AdamW8bit":
        # A scale for each 256 elements in a row, and a partition has other rows; with experts shared out, others again.
        limit = 1e-4 if cell["experts"] == "ep1" else 2e-4
        assert difference.loss < limit and difference.weights < 1e-3 and difference.gradient < 1e-5, (
            difference
        )
    else:  # Lion takes the sign of a difference of gradients: rounding flips single signs
        assert_same(trace, wanted, tolerance=1e-4 if cell["optimizer"] == "Lion" else 1e-5)


def test_every_pair_that_a_run_may_have_is_in_a_cell(corpus: str, out: Path) -> None:
    """And of every other, the rules say why not."""
    covered = set().union(*map(pairs_of, CELLS))
    missing = [
        pair
        for pair in pairs()
        if pair not in covered and refusal(completed(dict(pair)), corpus, out) is None
    ]
    assert not missing, "python -m tests.parity.covering"
