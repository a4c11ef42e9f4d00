"""A loss in chunks of tokens is the loss of whole logits, in every layout and for every head."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OneProcess
from tests.parity.agreement import assert_same
from tests.parity.models import BERT, T5, UNTIED
from tests.parity.record import record_raw
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import everyday

STEPS = 4
CHUNKS = {"loss": {"chunk_tokens": 24}}  # of the 64 tokens of a micro-batch: three, and not even
SP2 = {"tp": 2, "sequence_parallel": True}
AHEAD = {"model__mtp": {"depth": 2}}
MASKED = {"data__documents": "reset", "data__mask_boundary_loss": True}
ZB_V = {"schedule": "zb-v", "chunks": 2}

CELLS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # ranks, the model and its data, the layout
    "tp2+sp": (2, {}, {"layout": SP2}),
    "tp2-masked": (2, MASKED, {"layout": {"tp": 2}}),
    "dp2-zero3": (2, {}, {"deepspeed": "zero3.json"}),
    "dp2-zero3-ahead": (2, AHEAD, {"deepspeed": "zero3.json"}),
    "untied-dp2-zero3": (2, UNTIED, {"deepspeed": "zero3.json"}),
    "dp2-zero2": (2, {}, {"deepspeed": "zero2.json"}),
    "pp2-1f1b": (2, {}, {"layout": {"pp": 2}}),
    "untied-pp2-zb-h1": (2, UNTIED, {"layout": {"pp": 2, "schedule": "zb-h1"}}),
    "pp2-zb-v": (2, {}, {"layout": {"pp": 2, **ZB_V}}),
    "pp2-zb-v-ahead": (2, AHEAD, {"layout": {"pp": 2, **ZB_V}}),
    "pp2-interleaved-full": (
        2,
        {},
        {"layout": {"pp": 2, "schedule": "interleaved", "chunks": 2}, "recompute": "full"},
    ),
    "pp2-auto-ahead": (2, AHEAD, {"layout": {"pp": 2, "schedule": "auto"}}),
    "bert-tp2+sp-zero3": (4, BERT, {"layout": SP2, "deepspeed": "zero3.json"}),
    "bert-pp2": (2, BERT, {"layout": {"pp": 2}}),
    "t5-pp2-tp2+sp-zb-v": (4, T5, {"layout": {"pp": 2, **SP2, **ZB_V}}),
    "t5-dp2-zero3": (2, T5, {"deepspeed": "zero3.json"}),
}


@pytest.mark.ranks
@everyday("pp2-auto-ahead")
@pytest.mark.parametrize("name", CELLS)
def test_chunks_compute_what_whole_logits_do(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, name: str
) -> None:
    world_size, model, changes = CELLS[name]
    trace = ranks.run(record_raw, world_size, tiny(corpus, out, **{**model, **changes, **CHUNKS}), STEPS)[0]
    assert_same(trace, one_process(STEPS, **model))


@pytest.mark.ranks
@pytest.mark.thorough
@pytest.mark.parametrize(
    "changes", [{"layout": SP2}, {"layout": {"pp": 2}, "deepspeed": "pipeline.json"}], ids=["tp2+sp", "pp2"]
)
def test_in_bf16_chunks_follow_whole_logits(
    ranks: RankPool, corpus: str, out: Path, changes: dict[str, Any]
) -> None:
    raw = tiny(corpus, out, **changes, precision="bf16")
    wanted, found = (ranks.run(record_raw, 2, each, STEPS)[0] for each in (raw, {**raw, **CHUNKS}))
    assert found.losses == pytest.approx(wanted.losses, rel=1e-3)
    assert found.grad_norms == pytest.approx(wanted.grad_norms, rel=1e-2)
