"""FP8 in every layout: the same scales, hence the same roundings, hence the numbers of one process.

Tensor ranks sum in another order.  A number that lies next to a rounding's edge then goes to the other side, and moves
by an eighth: a few in a hundred thousand do, so those layouts are held against what other roundings would do.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.parity import Tensors
from tests.conftest import OneProcess
from tests.parity.record import record_raw
from tests.parity.test_layouts import assert_same
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import rare

STEPS = 4
MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32, "shared_ffn_hidden_size": 32, "aux_loss": 0.01}
EXPERT_TENSOR = {"layout": {"tp": 2, "sequence_parallel": True, "etp": 2}}
SHARED_OUT = {"layout": {"tp": 2, "sequence_parallel": True, "ep": 2, "etp": 1}}
TP = {"layout": {"tp": 2}}
TP_SP = {"layout": {"tp": 2, "sequence_parallel": True}}
PP = {"layout": {"pp": 2}, "deepspeed": "pipeline.json"}
ZB_V = {"layout": {"pp": 2, "schedule": "zb-v", "chunks": 2}, "deepspeed": "pipeline.json"}
DP = {"deepspeed": "zero1.json"}
ZERO_3 = {"deepspeed": "zero3.json"}
FULL = {"recompute": "full", "deepspeed": "zero2.json"}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"model__moe": MOE},
    "latent": {"model__preset": "tiny-deepseek", "model__num_layers": 4, "model__qk_norm": False},
}
MOE_ACT = {"recompute": {"mode": "selective", "modules": ["moe_act"]}, "deepspeed": "zero2.json"}
EDGE = 5e-5  # relative; measured 4e-5 in norms, after an embedding's gradient was summed in another order


def of(recipe: str, **more: Any) -> dict[str, Any]:
    experiment = {"experiment": True} if recipe == "nvfp4" else {}
    return {"recipe": recipe, **experiment, **more}


@pytest.mark.ranks
@rare("experts-nvfp4-pp2-recompute", "latent-blockwise-pp2", "latent-delayed-zero3")
@pytest.mark.parametrize(
    "model, recipe, layout",
    [
        pytest.param("dense", "delayed", ZB_V, id="delayed-zb-v"),
        pytest.param("dense", "delayed", FULL, id="delayed-zero2-recompute"),
        pytest.param("dense", "delayed", ZERO_3, id="delayed-zero3"),
        pytest.param("dense", "current", PP, id="current-pp2"),
        pytest.param("dense", "blockwise", DP, id="blockwise-dp2"),
        pytest.param("dense", "blockwise", ZB_V, id="blockwise-zb-v"),
        pytest.param("dense", "mxfp8", {**PP, "recompute": "full"}, id="mxfp8-pp2-recompute"),
        pytest.param("dense", "nvfp4", PP, id="nvfp4-pp2"),
        pytest.param("dense", "nvfp4", ZERO_3, id="nvfp4-zero3"),
        pytest.param("experts", "delayed", ZB_V, id="experts-delayed-zb-v"),
        pytest.param("experts", "nvfp4", {**PP, "recompute": "full"}, id="experts-nvfp4-pp2-recompute"),
        pytest.param("experts", "current", MOE_ACT, id="experts-current-zero2-selective"),
        pytest.param("latent", "blockwise", PP, id="latent-blockwise-pp2"),
        pytest.param("latent", "delayed", ZERO_3, id="latent-delayed-zero3"),
    ],
)
def test_fp8_computes_what_one_process_does(
    ranks: RankPool,
    corpus: str,
    one_process: OneProcess,
    out: Path,
    model: str,
    recipe: str,
    layout: dict[str, Any],
) -> None:
    changes = {**MODELS[model], "fp8": of(recipe)}
    trace = ranks.run(record_raw, 2, tiny(corpus, out, **layout, **changes), STEPS)[0]
    assert_same(trace, one_process(STEPS, **changes), EDGE)


# Of which no tensor's largest number lies at a power of two: there the order of sums decides over all of its roundings.
OFF_EDGES = {"train__seed": 1}


@pytest.mark.ranks
@rare("experts-current-tp2-ep2")
@pytest.mark.parametrize(
    "model, recipe, layout",
    [
        pytest.param({}, "delayed", TP_SP, id="delayed-tp2+sp"),
        pytest.param({}, "current", TP, id="current-tp2"),
        pytest.param({}, "current", TP_SP, id="current-tp2+sp"),
        pytest.param(MODELS["experts"] | OFF_EDGES, "delayed", EXPERT_TENSOR, id="experts-delayed-etp2"),
        pytest.param(MODELS["experts"] | OFF_EDGES, "current", SHARED_OUT, id="experts-current-tp2-ep2"),
        pytest.param(MODELS["latent"] | OFF_EDGES, "current", TP_SP, id="latent-current-tp2+sp"),
    ],
)
def test_tensor_ranks_round_as_one_process_does(
    ranks: RankPool,
    corpus: str,
    one_process: OneProcess,
    out: Path,
    model: dict[str, Any],
    recipe: str,
    layout: dict[str, Any],
) -> None:
    """Nearer to it by far than another recipe of as many bits is.

    In fp64, where nothing is moved, and for all recipes: tests/model_providers/fp8/test_tensor_parallel.py.
    """
    trace = ranks.run(record_raw, 2, tiny(corpus, out, **layout, **model, fp8=of(recipe)), STEPS)[0]
    reference, other = (one_process(STEPS, **model, fp8=of(each)) for each in (recipe, "mxfp8"))
    noise = apart(other.gradients, reference.gradients)
    assert noise > 1e-3, "recipes differ"
    assert apart(trace.gradients, reference.gradients) < noise / 10
    assert trace.losses[0] == pytest.approx(reference.losses[0], rel=1e-5)
    assert trace.losses == pytest.approx(reference.losses, rel=2e-3)


@pytest.mark.ranks
def test_experts_shared_out_over_replicas_have_the_scales_of_one_process(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path
) -> None:
    """An expert then takes two replicas' tokens at once, and a gradient's blocks along tokens are others."""
    changes = {"model__moe": MOE, "fp8": of("blockwise")}
    raw = tiny(corpus, out, **changes, layout={"ep": 2}, deepspeed="moe.json")
    trace, reference = ranks.run(record_raw, 2, raw, STEPS)[0], one_process(STEPS, **changes)
    wide = one_process(STEPS, model__moe=MOE)
    assert trace.losses[0] == pytest.approx(reference.losses[0], rel=1e-6)
    assert trace.losses == pytest.approx(reference.losses, rel=2e-3)
    rounding = apart(reference.gradients, wide.gradients)
    assert rounding > 1e-3 and apart(trace.gradients, reference.gradients) < rounding / 2


def apart(ours: Tensors, theirs: Tensors) -> float:
    """Of all tensors together: norm of the difference over the norm."""
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return math.sqrt(difference / sum(float(tensor.double().square().sum()) for tensor in theirs.values()))
