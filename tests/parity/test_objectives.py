"""BERT, T5 and other objectives in every layout compute what one process computes."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OneProcess
from tests.parity.agreement import assert_same
from tests.parity.models import BERT, ELECTRA, FIM, PREFIX_LM, ROBERTA, T5, T5_UL2, Changes
from tests.parity.record import record_raw
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import everyday

STEPS = 3
KINDS: dict[str, Changes] = {
    "bert": BERT,
    "norms-before": {**BERT, "model__bert__norm": "pre", "data__objective__second_task": "sentence_order"},
    "roberta": ROBERTA,
    "t5": T5,
    "t5-1.1-ul2-rotary": T5_UL2,
    "electra": ELECTRA,
    "fim": FIM,
    "prefix-lm": PREFIX_LM,
}
SP2 = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"layout": {"tp": 2}}),
    "tp2+sp-zero3": (4, {"layout": SP2, "deepspeed": "zero3.json"}),
    "dp2-zero0": (2, {"deepspeed": "zero0.json"}),
    "dp2-zero2": (2, {"deepspeed": "zero2.json"}),
    "pp2-dp2": (4, {"layout": {"pp": 2}}),
    "pp2-interleaved": (2, {"layout": {"pp": 2, "schedule": "interleaved", "chunks": 2}}),
    "pp2-tp2+sp-zb-v": (4, {"layout": {"pp": 2, "schedule": "zb-v", "chunks": 2, **SP2}}),
    "pp2-auto": (2, {"layout": {"pp": 2, "schedule": "auto"}}),
    "pp4-recompute": (4, {"layout": {"pp": 4}, "recompute": "full"}),
}


IN_ALL, IN_SOME = ("bert", "t5", "electra"), ("tp2+sp-zero3", "pp2-tp2+sp-zb-v")
CELLS = [(kind, layout) for kind in KINDS for layout in (LAYOUTS if kind in IN_ALL else IN_SOME)]


@pytest.mark.ranks
@everyday("bert-pp2-auto", "t5-pp4-recompute")
@pytest.mark.parametrize(("kind", "layout"), CELLS)
def test_layout_computes_what_one_process_does(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, kind: str, layout: str
) -> None:
    world_size, changes = LAYOUTS[layout]
    trace = ranks.run(record_raw, world_size, tiny(corpus, out, **KINDS[kind], **changes), STEPS)[0]
    assert_same(trace, one_process(STEPS, **KINDS[kind]))
