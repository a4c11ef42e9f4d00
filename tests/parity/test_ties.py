"""Two stages that hold the embedding hold the same bits, whatever the optimizer does."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pretrain.loop import Loop, TiesApart
from tests.conftest import OneProcess
from tests.opened import loop_on, opened
from tests.parity.agreement import assert_same
from tests.parity.record import record_raw
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import everyday

PIPELINE = '{"zero_optimization": {"stage": 1%s}}'
OFFLOAD = ', "offload_optimizer": {"device": "cpu"}'


def drift(raw: dict[str, Any], steps: int) -> tuple[float, int]:
    """Largest difference between the copies of the tied weight after some steps, and how many this rank holds."""
    with opened(raw) as here:
        for _ in range(steps):
            here.engine.train_step(here.feed.next_step())
        return here.engine.tie_drift(), len(here.engine.module.replicas)


@pytest.mark.ranks
@everyday("2-1-fp32-offload", "2-1-bf16-", "2-1-bf16-offload", "4-1-fp32-")
@pytest.mark.parametrize("offload", ["", OFFLOAD], ids=["", "offload"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("pp", "dp"), [(2, 1), (4, 1), (2, 2)])
def test_tied_copies_stay_bitwise_equal(
    ranks: RankPool, corpus: str, out: Path, tmp_path: Path, pp: int, dp: int, dtype: str, offload: str
) -> None:
    document = tmp_path / "deepspeed.json"
    document.write_text(PIPELINE % offload)
    raw = tiny(corpus, out, layout={"pp": pp}, precision=dtype, deepspeed=str(document), optimizer__lr=1e-2)
    drifts = ranks.run(drift, pp * dp, raw, 6)
    assert {difference for difference, _ in drifts} == {0.0}
    assert sum(copies for _, copies in drifts) == 2 * dp, "the first and last stages hold a copy"


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [{"chunks": 2, "schedule": "interleaved"}, {"schedule": "zb-h1"}], ids=str)
def test_tied_copies_stay_bitwise_equal_in_other_schedules(
    ranks: RankPool, corpus: str, out: Path, layout: dict[str, Any]
) -> None:
    raw = tiny(corpus, out, layout={"pp": 2, **layout}, precision="bf16", deepspeed="pipeline.json")
    assert ranks.run(drift, 2, raw, 6) == [(0.0, 1)] * 2


def part_the_copies(raw: dict[str, Any]) -> str:
    """Train with a check every second step; one copy is touched before the third."""
    with opened(raw) as here:

        class Touching(Loop):
            def _one_step(self, step: int, *rest: Any) -> Any:
                if step == 2 and dist.get_rank() == 1:
                    here.engine.module.replicas[0][0].data[0, 0] += 0.5
                return super()._one_step(step, *rest)

        loop = loop_on(here, Touching)
        try:
            loop.train(0)
        except TiesApart as stop:
            return str(stop)
    return "not noticed"


@pytest.mark.ranks
def test_copies_that_come_apart_stop_the_run(ranks: RankPool, corpus: str, out: Path) -> None:
    raw = tiny(
        corpus, out, layout={"pp": 2}, deepspeed="zero0.json", train={"steps": 6, "tie_check_every": 2}
    )
    for message in ranks.run(part_the_copies, 2, raw):
        assert message.startswith("step 4: the copies of a tied weight differ by 0.")


@pytest.mark.ranks
@everyday("{'pp': 2}")
@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 2, "tp": 2, "sequence_parallel": True}], ids=str)
def test_offload_under_a_pipeline_computes_what_one_process_does(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    document = tmp_path / "deepspeed.json"
    document.write_text(PIPELINE % OFFLOAD)
    raw = tiny(corpus, out, layout=layout, deepspeed=str(document))
    trace = ranks.run(record_raw, 2 * layout.get("tp", 1), raw, 6)[0]
    assert_same(trace, one_process(6))
