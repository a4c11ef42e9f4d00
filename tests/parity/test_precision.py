"""bf16 in every layout: gradients are summed in the format that was asked for, and losses follow fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import OneProcess
from tests.parity.record import record_raw
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import everyday

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2-zero1": {"deepspeed": "zero1.json"},
    "dp2-zero2": {"deepspeed": "zero2.json"},
    "dp2-zero3": {"deepspeed": "zero3.json"},
    "dp2-zero2-cpu": {"deepspeed": "zero2_cpu_offload.json"},
    "dp2-zero3-cpu": {"deepspeed": "zero3_cpu_offload.json"},
    "tp2+sp": {"deepspeed": "zero1.json", "layout": {"tp": 2, "sequence_parallel": True}},
    "pp2": {"deepspeed": "pipeline.json", "layout": {"pp": 2}},
}
MANY = {"batch": {"global_size": 16, "micro_size": 1}}
CLOSE = 5e-3  # relative; measured 1e-3 after 20 steps


@pytest.mark.ranks
@everyday("dp2-zero1-bf16", "dp2-zero2-fp32", "dp2-zero3-cpu-fp32", "pp2-fp32", "pp2-bf16")
@pytest.mark.parametrize("accumulate", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_summed_in_the_format_asked_for(
    ranks: RankPool, corpus: str, out: Path, layout: str, accumulate: str
) -> None:
    """A sum kept in bf16 is a bf16 number; one kept in fp32, over micro-batches and ranks, hardly ever is."""
    precision = {"dtype": "bf16", "accumulate": accumulate}
    raw = tiny(corpus, out, precision=precision, **MANY, **LAYOUTS[layout])
    trace = ranks.run(record_raw, 2, raw, 1)[0]
    whole = torch.cat([gradient.flatten() for gradient in trace.gradients.values()])
    whole = whole[whole != 0]
    rounded = (whole == whole.bfloat16().float()).float().mean().item()
    assert rounded < 0.5 if accumulate == "fp32" else rounded > 0.5, f"{rounded:.2f} are bf16 numbers"


@pytest.mark.ranks
@everyday("dp2-zero1", "pp2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_follows_fp32_in_every_layout(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, layout: str
) -> None:
    exact = one_process(20)
    raw = tiny(corpus, out, precision="bf16", **LAYOUTS[layout])
    trace = ranks.run(record_raw, 2, raw, 20)[0]
    differences = [abs(a - b) / b for a, b in zip(trace.losses, exact.losses, strict=True)]
    assert max(differences) < CLOSE, differences
    assert trace.losses[-1] < trace.losses[0] - 0.1
