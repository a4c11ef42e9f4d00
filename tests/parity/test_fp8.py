"""FP8 in every layout: the same scales, hence the same roundings, hence the losses and weights of one process.

Another order of sums moves an activation by its last bit.  In fp32 a few in a hundred thousand then cross a rounding
boundary and move by an eighth, and others after them: which, and how far the loss moves, depends on the layout, the
instruction set and the number of threads.  So these tests run in a number format and with an optimizer (`EXACT`) in
which nothing crosses, and compare to the precision of what is recorded, fp32.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.parity import Tensors, Trace
from tests.parity.agreement import assert_same
from tests.parity.models import MOE
from tests.parity.record import record_fp64
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import everyday

STEPS = 4
TOLERANCE = 1e-6
# Activations in fp64, whose last bit is 1e-9 of fp32's: a number lies that near to a rounding boundary once in 1e14.
# Weights and sums of gradients are in fp32 under ZeRO, so these must be equal bit for bit.  Lion moves a weight by the
# sign of its gradient alone, and replicas have one micro-batch each: a + b = b + a, where (a + b) + (c + d) is not
# ((a + b) + c) + d.  Tied embeddings would sum gradients of two stages.
EXACT = {
    "optimizer": {"type": "Lion", "lr": 1e-3, "weight_decay": 0.0, "gradient_clipping": 0.5},
    "model__tie_embeddings": False,
}
TWO_MICRO_BATCHES = {"batch__global_size": 4}
EXPERTS = {**MOE, "z_loss": 0.0, "router_dtype": "fp64"}
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
    "experts": {"model__moe": EXPERTS},
    "latent": {"model__preset": "tiny-deepseek", "model__num_layers": 4, "model__qk_norm": False},
}
MOE_ACT = {"recompute": {"mode": "selective", "modules": ["moe_act"]}, "deepspeed": "zero2.json"}


def of(recipe: str, **more: Any) -> dict[str, Any]:
    experiment = {"experiment": True} if recipe == "nvfp4" else {}
    return {"recipe": recipe, **experiment, **more}


@pytest.fixture(scope="module")
def exact(ranks: RankPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trace]:
    """``exact(fp8=..., ...)``: the trace of a single process in fp64, kept."""
    kept: dict[str, Trace] = {}
    out = tmp_path_factory.mktemp("exact")

    def trace(**changes: Any) -> Trace:
        key = repr(sorted(changes.items()))
        if key not in kept:
            kept[key] = ranks.run(record_fp64, 1, tiny(corpus, out, **EXACT, **changes), STEPS)[0]
        return kept[key]

    return trace


@pytest.mark.ranks
@everyday(
    "delayed-zb-v",
    "current-pp2",
    "blockwise-dp2",
    "mxfp8-pp2-recompute",
    "nvfp4-zero3",
    "experts-delayed-zb-v",
    "experts-delayed-etp2",
    "current-tp2+sp",
)
@pytest.mark.parametrize(
    "model, recipe, layout",
    [
        pytest.param("dense", "delayed", ZB_V, id="delayed-zb-v"),
        pytest.param("dense", "delayed", FULL, id="delayed-zero2-recompute"),
        pytest.param("dense", "delayed", ZERO_3, id="delayed-zero3"),
        pytest.param("dense", "delayed", TP_SP, id="delayed-tp2+sp"),
        pytest.param("dense", "current", PP, id="current-pp2"),
        pytest.param("dense", "current", TP, id="current-tp2"),
        pytest.param("dense", "current", TP_SP, id="current-tp2+sp"),
        pytest.param("dense", "blockwise", DP, id="blockwise-dp2"),
        pytest.param("dense", "blockwise", ZB_V, id="blockwise-zb-v"),
        pytest.param("dense", "mxfp8", {**PP, "recompute": "full"}, id="mxfp8-pp2-recompute"),
        pytest.param("dense", "nvfp4", PP, id="nvfp4-pp2"),
        pytest.param("dense", "nvfp4", ZERO_3, id="nvfp4-zero3"),
        pytest.param("experts", "delayed", ZB_V, id="experts-delayed-zb-v"),
        pytest.param("experts", "delayed", EXPERT_TENSOR, id="experts-delayed-etp2"),
        pytest.param("experts", "nvfp4", {**PP, "recompute": "full"}, id="experts-nvfp4-pp2-recompute"),
        pytest.param("experts", "current", MOE_ACT, id="experts-current-zero2-selective"),
        pytest.param("experts", "current", SHARED_OUT, id="experts-current-tp2-ep2"),
        pytest.param("latent", "blockwise", PP, id="latent-blockwise-pp2"),
        pytest.param("latent", "delayed", ZERO_3, id="latent-delayed-zero3"),
        pytest.param("latent", "current", TP_SP, id="latent-current-tp2+sp"),
    ],
)
def test_fp8_computes_what_one_process_does(
    ranks: RankPool,
    corpus: str,
    exact: Callable[..., Trace],
    out: Path,
    model: str,
    recipe: str,
    layout: dict[str, Any],
) -> None:
    changes = {**MODELS[model], **({} if "layout" in layout else TWO_MICRO_BATCHES)}
    raw = tiny(corpus, out, **EXACT, **layout, **changes, fp8=of(recipe))
    trace, reference = ranks.run(record_fp64, 2, raw, STEPS)[0], exact(**changes, fp8=of(recipe))
    assert apart(reference.gradients, exact(**changes).gradients) > 1e-3, (
        "the recipe must matter in this test"
    )
    assert_same(trace, reference, TOLERANCE)


@pytest.mark.ranks
def test_experts_shared_out_over_replicas_have_the_scales_of_one_process(
    ranks: RankPool, corpus: str, exact: Callable[..., Trace], out: Path
) -> None:
    """An expert then takes two replicas' tokens at once, and a gradient's blocks along tokens are others."""
    changes = {"model__moe": EXPERTS, "fp8": of("blockwise")}
    raw = tiny(corpus, out, **EXACT, **changes, layout={"ep": 2}, deepspeed="moe.json")
    trace, reference = ranks.run(record_fp64, 2, raw, STEPS)[0], exact(**changes)
    assert trace.losses[0] == pytest.approx(reference.losses[0], rel=1e-6)
    assert trace.losses == pytest.approx(reference.losses, rel=2e-3)
    rounding = apart(reference.gradients, exact(model__moe=EXPERTS).gradients)
    assert rounding > 1e-3 and apart(trace.gradients, reference.gradients) < rounding / 2


def apart(ours: Tensors, theirs: Tensors) -> float:
    """Of all tensors together: norm of the difference over the norm."""
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return math.sqrt(difference / sum(float(tensor.double().square().sum()) for tensor in theirs.values()))
