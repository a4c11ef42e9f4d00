"""Every pipeline schedule computes what one process does."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from pretrain.batches import Feed, open_run_data
from pretrain.config_io import make_run
from pretrain.engine.groups import join
from pretrain.engine.stage_module import StageModule
from pretrain.engine.step_control import StepControl
from pretrain.optim import learning_rate_factor
from pretrain.parity import compare
from pretrain.run import make_plan, pipeline_shape
from tests.conftest import OneProcess
from tests.parity.agreement import assert_same
from tests.parity.record import record_raw
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import everyday, rare

STEPS = 5  # of schedules alone
FEW = 3  # of schedules with something else
MANY = {"batch": {"global_size": 8, "micro_size": 1}, "model__num_layers": 6}  # 4 or 8 micro-batches
FAMILIES = {
    "gpipe": 1,
    "1f1b": 1,
    "eager": 1,
    "interleaved": 2,
    "zb-h1": 1,
    "zb-v": 2,
    "interleaved-zb": 2,
}


def pipeline(name: str, pp: int, **layout: Any) -> dict[str, Any]:
    return {
        "layout": {"pp": pp, "schedule": name, "chunks": FAMILIES[name], **layout},
        "deepspeed": "pipeline.json",
    }


@pytest.mark.ranks
@everyday(
    "gpipe-2-tied",
    "eager-2-untied",
    "interleaved-4-untied",
    "zb-v-4-tied",
    "interleaved-zb-4-untied",
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_schedule_computes_what_one_process_does(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, name: str, pp: int, tied: bool
) -> None:
    changes = {**MANY, "model__tie_embeddings": tied}
    trace = ranks.run(record_raw, pp, tiny(corpus, out, **changes, **pipeline(name, pp)), STEPS)[0]
    difference = compare(trace, one_process(STEPS, **changes))
    assert max(difference.loss, difference.weights) <= 1e-6, difference
    assert max(difference.grad_norm, difference.gradient) <= 1e-5, difference


class Stock(StepControl, PipelineEngine):
    """DeepSpeed's own 1F1B around our module: its instruction table, its messages, its backward passes."""


def stock_1f1b(raw: dict[str, Any], steps: int) -> list[float]:
    run = make_run(raw, world_size=dist.get_world_size())
    groups = join(run.layout)
    data = open_run_data(run, groups)
    module = StageModule(make_plan(run, groups), groups, pipeline_shape(run))
    engine = Stock.around(
        module, groups, module.mpu(), json=dict(run.deepspeed), optimizer=run.config.optimizer
    )
    feed = Feed(data.train, run, groups, consumed_samples=0)
    losses = []
    for step in range(steps):
        rate = learning_rate_factor(run.config.schedule, step, run.config.train.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = run.config.optimizer.lr * rate
        batches = [batch for batch in feed.next_step() if batch is not None]
        reading = iter([(batch.inputs, batch.targets) for batch in batches]) if batches else None
        losses.append(float(engine.train_batch(reading)))
    feed.close()
    return losses


@pytest.mark.ranks
@rare("4")
@pytest.mark.parametrize("pp", [2, 4])
def test_ours_is_deepspeeds_own_1f1b(ranks: RankPool, corpus: str, out: Path, pp: int) -> None:
    """Without clipping, since its norm without ZeRO is that of stage 0 alone."""
    raw = tiny(corpus, out, **MANY, **pipeline("1f1b", pp), optimizer__gradient_clipping=0.0)
    raw["deepspeed"] = "zero0.json"
    stock = ranks.run(stock_1f1b, pp, raw, STEPS)[0]
    for name in ("1f1b", "interleaved", "zb-v"):
        if pp == 4 and name != "1f1b":
            continue
        ours = ranks.run(record_raw, pp, {**raw, "layout": pipeline(name, pp)["layout"]}, STEPS)[0]
        assert ours.losses == pytest.approx(stock, rel=1e-6), name


@pytest.mark.ranks
@everyday(
    "interleaved-{'deepspeed': 'zero0.json', 'layout__messages': 'batch'}",
    "zb-v-{'layout__messages': 'channel'}",
    "interleaved-{'layout__partition': [0, 2, 4, 5, 9]}",
)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("interleaved", {"recompute": "full"}),
        ("zb-v", {"recompute": {"mode": "full", "every": 2}}),
        ("zb-h1", {"recompute": "full"}),
        (
            "interleaved-zb",
            {"recompute": {"mode": "selective", "modules": ["core_attn", "layernorm", "mlp"]}},
        ),
        ("zb-v", {"recompute": {"mode": "selective", "modules": ["layernorm", "mlp"]}}),
        ("interleaved", {"data__documents": "reset"}),
        ("zb-v", {"data__documents": "reset", "data__mask_boundary_loss": True}),
        ("zb-v", {"deepspeed": "zero0.json"}),
        ("interleaved", {"deepspeed": "zero0.json", "layout__messages": "batch"}),
        ("zb-v", {"layout__messages": "channel"}),
        ("interleaved", {"layout__partition": [0, 2, 4, 5, 9]}),
        ("zb-h1", {"layout__partition": [0, 3, 9]}),
    ],
    ids=str,
)
def test_schedules_go_with_everything_else(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, name: str, changes: dict[str, Any]
) -> None:
    data = {key: value for key, value in changes.items() if key.startswith("data")}
    raw = tiny(corpus, out, **{**MANY, **pipeline(name, 2), **changes})
    trace = ranks.run(record_raw, 2, raw, FEW)[0]
    assert_same(trace, one_process(FEW, **MANY, **data))


@pytest.mark.ranks
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "layout", "world_size"),
    [
        ("interleaved", {"tp": 2, "sequence_parallel": True}, 4),
        ("zb-v", {"tp": 2, "sequence_parallel": True}, 4),
        ("zb-h1", {"tp": 2}, 4),
        ("interleaved", {}, 4),
        ("zb-v", {}, 4),
    ],
    ids=str,
)
def test_schedules_go_with_tensor_and_data_parallelism(
    ranks: RankPool,
    corpus: str,
    one_process: OneProcess,
    out: Path,
    name: str,
    layout: dict[str, Any],
    world_size: int,
) -> None:
    raw = tiny(corpus, out, **MANY, **pipeline(name, 2, **layout))
    trace = ranks.run(record_raw, world_size, raw, FEW)[0]
    assert_same(trace, one_process(FEW, **MANY))


@pytest.mark.ranks
@everyday("interleaved-bf16")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["1f1b", "interleaved"])
def test_zero_2_in_a_pipeline_computes_what_one_process_does(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, name: str, dtype: str
) -> None:
    changes = {**MANY, "model__tie_embeddings": False}
    sharded = {**pipeline(name, 2), "deepspeed": "zero2.json", "precision": dtype}
    trace = ranks.run(record_raw, 4, tiny(corpus, out, **changes, **sharded), FEW)[0]
    wanted = one_process(FEW, **changes)
    if dtype == "fp32":
        assert_same(trace, wanted)
    else:
        assert trace.losses == pytest.approx(wanted.losses, rel=5e-3)


@pytest.mark.ranks
@everyday("interleaved-True")
@pytest.mark.parametrize(("name", "offload"), [("interleaved", True), ("zb-h1", True), ("zb-v", False)])
def test_bf16_is_the_same_in_every_schedule(
    ranks: RankPool, corpus: str, out: Path, tmp_path: Path, name: str, offload: bool
) -> None:
    """Against 1F1B in bf16: the order in which micro-batches are summed is all that differs."""
    more = ', "offload_optimizer": {"device": "cpu"}' if offload else ""
    document = tmp_path / "deepspeed.json"
    document.write_text(f'{{"zero_optimization": {{"stage": 1{more}}}}}')
    changes = {**MANY, "precision": "bf16"}
    plain = {**pipeline("1f1b", 2), "deepspeed": str(document)}
    wanted = ranks.run(record_raw, 2, tiny(corpus, out, **changes, **plain), FEW)[0]
    raw = tiny(corpus, out, **changes, **{**pipeline(name, 2), "deepspeed": str(document)})
    found = ranks.run(record_raw, 2, raw, FEW)[0]
    assert found.losses == pytest.approx(wanted.losses, rel=2e-3)
    assert found.grad_norms == pytest.approx(wanted.grad_norms, rel=2e-2)
