"""Offload to CPU memory and to NVMe trains exactly what the same run trains without it."""

import json
from pathlib import Path
from typing import Any

import pytest

from model_providers.cost import parameters
from pretrain.engine.preflight import libaio_is_there
from pretrain.loop import begin_step
from pretrain.parity import Trace, compare
from tests.conftest import OneProcess
from tests.divided import HALF, two_devices
from tests.opened import opened
from tests.parity.agreement import assert_same
from tests.parity.record import record_raw
from tests.ranks import RankPool
from tests.runs import checked, tiny
from tests.thorough import cells, everyday

STEPS = 5
# DeepSpeed leaves tensors below 1 MB in memory (MIN_AIO_BYTES, deepspeed/runtime/swap_tensor/constants.py).
LARGE_ENOUGH = {
    "model__hidden_size": 512,
    "model__ffn_hidden_size": 2048,
    "model__num_layers": 2,
    "model__init_std": 0.05,
}
OPTIMIZER_ON_NVME: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "in turn": {"pipeline_read": False, "pipeline_write": False},
    "fast init": {"fast_init": True},
}
COMPILE_S = 800  # a kernel's first use on a machine compiles it


@pytest.mark.ranks
@everyday("zero2_cpu_offload.json")
@pytest.mark.timeout(COMPILE_S)
@pytest.mark.parametrize("name", ["zero2_cpu_offload.json", "zero3_cpu_offload.json"])
def test_cpu_offload_computes_what_one_process_does(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, name: str
) -> None:
    trace = ranks.run(record_raw, 2, tiny(corpus, out, deepspeed=name), STEPS, timeout_s=COMPILE_S)[0]
    assert_same(trace, one_process(STEPS))


@pytest.mark.nvme
@pytest.mark.ranks
@pytest.mark.timeout(COMPILE_S)
@pytest.mark.skipif(not libaio_is_there(), reason="needs libaio (apt install libaio-dev)")
@pytest.mark.parametrize(
    "changed", cells(OPTIMIZER_ON_NVME, thorough=set(OPTIMIZER_ON_NVME) - {"as shipped"})
)
def test_nvme_offload_computes_what_one_process_does(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, tmp_path: Path, changed: str
) -> None:
    disk = tmp_path / "nvme"
    disk.mkdir()
    document = json.loads(Path("ds_configs/zero3_nvme_offload.json").read_text())
    document["zero_optimization"]["offload_optimizer"] |= OPTIMIZER_ON_NVME[changed]
    (tmp_path / "ds.json").write_text(json.dumps(document))
    raw = tiny(corpus, out, **LARGE_ENOUGH, deepspeed=str(tmp_path / "ds.json"), nvme_path=str(disk))
    trace = ranks.run(record_raw, 2, raw, STEPS, timeout_s=COMPILE_S)[0]
    written_bytes = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
    # Two Adam moments and the fp32 weights; small tensors stay in memory.
    assert written_bytes > 8 * parameters(checked(raw, 2).config.model), (
        "the states were not on the NVMe folder"
    )
    assert_same(trace, one_process(STEPS, **LARGE_ENOUGH))


def record_divided(raw: dict[str, Any], steps: int) -> tuple[Trace | None, int]:
    """The trace, and the number of sub-groups that the second optimizer stepped."""
    with two_devices() as seconds:
        trace = record_raw(raw, steps)
    return trace, len(seconds[0].state)


@pytest.mark.ranks
@pytest.mark.timeout(COMPILE_S)
def test_an_optimizer_half_offloaded_computes_what_one_process_does(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, tmp_path: Path
) -> None:
    """Under a learning rate that changes, which DeepSpeed's second optimizer would not hear of."""
    (tmp_path / "half.json").write_text(json.dumps(HALF))
    raw = tiny(corpus, out, deepspeed=str(tmp_path / "half.json"))
    found = ranks.run(record_divided, 2, raw, STEPS, timeout_s=COMPILE_S)
    assert found[0][1] > 3, "the second optimizer has sub-groups of its own"
    assert_same(found[0][0], one_process(STEPS))


def rates_of_both_optimizers(raw: dict[str, Any], steps: int) -> list[tuple[float, float]]:
    with two_devices() as seconds, opened(raw) as here:
        rates = []
        for step in range(steps):
            begin_step(here.run, here.engine, step)
            before = here.engine.learning_rate
            here.engine.train_step(here.feed.next_step())
            rates.append((before, seconds[0].param_groups[0]["lr"]))
    return rates


@pytest.mark.ranks
@pytest.mark.timeout(COMPILE_S)
def test_both_halves_hear_the_jsons_own_scheduler(
    ranks: RankPool, corpus: str, out: Path, tmp_path: Path
) -> None:
    warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_type": "linear"}}
    (tmp_path / "half.json").write_text(json.dumps({**HALF, "scheduler": warmup}))
    raw = tiny(corpus, out, deepspeed=str(tmp_path / "half.json"))
    raw.pop("schedule", None)
    rates = ranks.run(rates_of_both_optimizers, 2, raw, 4, timeout_s=COMPILE_S)[0]
    assert all(first == second for first, second in rates) and rates[-1][0] > rates[2][0] > 0


@pytest.mark.ranks
@everyday("fp32")
@pytest.mark.parametrize("accumulate", ["fp32", "bf16"])
def test_tied_weights_stay_tied_under_bf16_offload_and_pipeline(
    ranks: RankPool, corpus: str, out: Path, tmp_path: Path, accumulate: str
) -> None:
    """DeepSpeed 0.19 unties them silently with fp32 accumulation: gradients lie where it does not look."""
    document = tmp_path / "offload.json"
    document.write_text('{"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}')
    changes: dict[str, Any] = {
        "layout": {"pp": 2},
        "precision": {"dtype": "bf16", "accumulate": accumulate},
        "optimizer__lr": 1e-2,
    }
    offloaded = ranks.run(record_raw, 2, tiny(corpus, out, **changes, deepspeed=str(document)), 12)[0]
    resident = ranks.run(record_raw, 2, tiny(corpus, out, **changes, deepspeed="pipeline.json"), 12)[0]
    difference = compare(offloaded, resident)
    assert difference.loss < 2e-3, difference
    assert difference.weights < 1e-2, difference
