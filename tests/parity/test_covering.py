"""Every pair of features computes, in some layout, what one process does: the cells of `covering.json`."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.parity import Tensors, Trace, compare
from tests.parity.agreement import assert_alike
from tests.parity.covering import (
    BASES,
    Cell,
    around,
    changes,
    name,
    num_ranks,
    pairs,
    pairs_of,
    read,
    reference,
    refusal,
)
from tests.parity.record import record_raw
from tests.ranks import RankPool
from tests.runs import tiny

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
            kept[key] = ranks.run(record_raw, num_ranks(cell), tiny(corpus, out, **changes(cell)), STEPS)[0]
        return kept[key]

    return trace


@pytest.mark.ranks
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_cell_computes_what_one_process_does(trace_of: Callable[[Cell], Trace], cell: Cell) -> None:
    trace, wanted = trace_of(cell), trace_of(reference(cell))
    difference = compare(trace, wanted)
    assert trace.grad_norms[0] == pytest.approx(norm_of(trace.gradients), rel=1e-5), "clipping uses this norm"
    if cell["precision"] == "bf16":  # as test_bf16_is_the_same_in_every_schedule
        assert trace.losses == pytest.approx(wanted.losses, rel=2e-3), difference
        assert trace.grad_norms == pytest.approx(wanted.grad_norms, rel=2e-2), difference
    else:  # experts that are shared out have other partitions again, so 8-bit moments other rows
        assert_alike(cell["optimizer"], trace, wanted, loss=1e-4 if cell["experts"] == "ep1" else 2e-4)


def norm_of(tensors: Tensors) -> float:
    """L2, of all of them together."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def test_no_cell_is_its_own_reference() -> None:
    assert [name(cell) for cell in CELLS if cell == reference(cell)] == []


def test_every_pair_that_a_run_may_have_is_in_a_cell(corpus: str, out: Path) -> None:
    """The rules refuse every other, on all bases; one further change is tried when the cells are made."""
    covered = set().union(*map(pairs_of, CELLS))
    missing = [
        pair
        for pair in pairs()
        if pair not in covered
        and any(refusal(cell, corpus, out) is None for cell in itertools.islice(around(pair), len(BASES)))
    ]
    assert not missing, "python -m tests.parity.covering"
