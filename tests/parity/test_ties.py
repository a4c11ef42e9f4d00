"""Two stages that hold the embedding hold the same bits, whatever the optimizer does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import OneProcess
from tests.opened import opened
from tests.parity.record import record_raw
from tests.parity.test_layouts import assert_same
from tests.ranks import RankPool
from tests.runs import tiny

PIPELINE = '{"zero_optimization": {"stage": 1%s}}'
OFFLOAD = ', "offload_optimizer": {"device": "cpu"}'


def drift(raw: dict[str, Any], steps: int) -> float:
    """Largest difference between the two copies of the tied weight after some steps; this rank's view."""
    with opened(raw) as here:
        for _ in range(steps):
            here.engine.train_step(here.feed.next_step())
    differences = [0.0]
    for parameter, group in here.engine.module.replicas:
        copies = [torch.empty_like(parameter) for _ in range(dist.get_world_size(group))]
        dist.all_gather(copies, parameter.data.contiguous(), group=group)
        differences.append(float((copies[0] - copies[1]).abs().max()))
    return max(differences) if len(differences) > 1 else -1.0


@pytest.mark.ranks
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
    assert max(drifts) == 0.0, "the first and last stages hold a copy, and both are equal"


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 2, "tp": 2, "sequence_parallel": True}], ids=str)
def test_offload_under_a_pipeline_computes_what_one_process_does(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    document = tmp_path / "deepspeed.json"
    document.write_text(PIPELINE % OFFLOAD)
    raw = tiny(corpus, out, layout=layout, deepspeed=str(document))
    trace = ranks.run(record_raw, 2 * layout.get("tp", 1), raw, 6)[0]
    assert_same(trace, one_process(6))
