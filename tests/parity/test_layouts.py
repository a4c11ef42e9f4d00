"""The heart of the project: every layout gives the losses, norms, gradients and weights of one process."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import OneProcess
from tests.parity.agreement import assert_same
from tests.parity.record import record_raw
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import everyday

STEPS = 20


class Cell(NamedTuple):
    """One layout of the suite."""

    world_size: int
    zero: int
    tp: int = 1
    pp: int = 1
    sp: bool = False

    def __str__(self) -> str:
        dp = self.world_size // (self.tp * self.pp)
        return f"tp{self.tp}{'+sp' if self.sp else ''}-pp{self.pp}-dp{dp}-zero{self.zero}"

    def changes(self) -> dict[str, Any]:
        return {
            "layout": {"tp": self.tp, "pp": self.pp, "sequence_parallel": self.sp},
            "deepspeed": f"zero{self.zero}.json",
        }


CELLS = (
    Cell(2, 0, tp=2),
    Cell(2, 0, tp=2, sp=True),
    Cell(4, 0, tp=4),
    Cell(2, 0, pp=2),
    Cell(4, 1, pp=4),
    Cell(2, 0),
    Cell(2, 1),
    Cell(2, 2),
    Cell(2, 3),
    Cell(4, 1, tp=2, pp=2),
    Cell(4, 1, tp=2, pp=2, sp=True),
    Cell(4, 1, pp=2),
    Cell(4, 3, tp=2),
    Cell(4, 3, tp=2, sp=True),
    Cell(4, 2, tp=2, sp=True),
)


@pytest.mark.ranks
@everyday("tp1-pp4-dp1-zero1-tied", "tp1-pp1-dp2-zero2-tied")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_layout_computes_what_one_process_does(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, cell: Cell, tied: bool
) -> None:
    reference = one_process(STEPS, model__tie_embeddings=tied)
    raw = tiny(corpus, out, model__tie_embeddings=tied, **cell.changes())
    trace = ranks.run(record_raw, cell.world_size, raw, STEPS)[0]
    assert_same(trace, reference)
    assert reference.losses[-1] < reference.losses[0] - 0.1, "the reference itself must learn"
