"""Features that must not care about the layout, and layouts that must not care about each other's features."""

from pathlib import Path
from typing import Any, cast

import pytest

from pretrain.loop import begin_step
from pretrain.parity import Trace, compare
from tests.conftest import OneProcess
from tests.opened import opened
from tests.parity.agreement import assert_same
from tests.parity.models import GPT2, WINDOW
from tests.parity.record import record_raw
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import everyday

STEPS = 3
TP_SP = {"layout": {"tp": 2, "sequence_parallel": True}, "deepspeed": "zero1.json"}
PP = {"layout": {"pp": 2}, "deepspeed": "pipeline.json"}
DP = {"layout": {}, "deepspeed": "zero2.json"}
DP_ZERO_3 = {"layout": {}, "deepspeed": "zero3.json"}
LAYOUTS = pytest.mark.parametrize(
    "layout", [TP_SP, PP, DP, DP_ZERO_3], ids=["tp2+sp", "pp2", "dp2", "dp2-zero3"]
)
EXPERTS = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64}
PARTS = {"mode": "selective", "modules": ["core_attn", "layernorm", "mlp"]}
DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}


@pytest.mark.ranks
@everyday("masked-dp2")
@LAYOUTS
@pytest.mark.parametrize(
    "data",
    [
        {"data__documents": "reset"},
        {"data__mask_boundary_loss": True},
        {
            "data__documents": "reset",
            "data__mask_boundary_loss": True,
            "model__position_embedding": "learned",
        },
    ],
    ids=["reset", "masked", "reset-masked-learned"],
)
def test_document_boundaries_are_the_same_in_every_layout(
    ranks: RankPool,
    corpus: str,
    one_process: OneProcess,
    out: Path,
    layout: dict[str, Any],
    data: dict[str, Any],
) -> None:
    trace = ranks.run(record_raw, 2, tiny(corpus, out, **layout, **data), STEPS)[0]
    assert_same(trace, one_process(STEPS, **data))
    plain = one_process(STEPS)
    assert abs(trace.losses[0] - plain.losses[0]) > 1e-3, "the option must change what is computed"


@pytest.mark.ranks
@everyday("selective-tp2+sp")
@LAYOUTS
@pytest.mark.parametrize(
    "recompute",
    [PARTS, {"mode": "full"}, {"mode": "full", "every": 3}],
    ids=["selective", "full", "every-3"],
)
def test_recompute_changes_nothing_even_with_dropout(
    ranks: RankPool, corpus: str, out: Path, layout: dict[str, Any], recompute: dict[str, Any]
) -> None:
    kept = ranks.run(record_raw, 2, tiny(corpus, out, **layout, **DROPOUT), 3)[0]
    again = ranks.run(record_raw, 2, tiny(corpus, out, **layout, **DROPOUT, recompute=recompute), 3)[0]
    difference = compare(again, kept)
    assert max(difference.loss, difference.grad_norm, difference.gradient) <= 1e-6, difference


OFFLOADED = {
    "dp2-zero3": (2, DP_ZERO_3, "none"),
    "dp2-zero3-full": (2, DP_ZERO_3, "full"),
    "tp2+sp": (2, TP_SP, "selective"),
    "tp2+sp-zero3": (4, {**TP_SP, "deepspeed": "zero3.json"}, "none"),
    "interleaved": (2, {**PP, "layout": {"pp": 2, "schedule": "interleaved", "chunks": 2}}, "none"),
    "interleaved-full": (
        2,
        {**PP, "layout": {"pp": 2, "schedule": "interleaved", "chunks": 2}, "model__num_layers": 8},
        "full",
    ),
    "zb-h1": (2, {**PP, "layout": {"pp": 2, "schedule": "zb-h1"}}, "none"),
    "zb-v-tp2+sp": (
        4,
        {**PP, "layout": {"pp": 2, "schedule": "zb-v", "chunks": 2, "tp": 2, "sequence_parallel": True}},
        "none",
    ),
    "experts": (2, {"layout": {"ep": 2}, "model__moe": EXPERTS}, "none"),
}


def record_offloaded(raw: dict[str, Any], steps: int) -> tuple[Trace | None, int]:
    """The trace, and the most bytes that waited on the host in the first step of another start."""
    with opened(raw) as here:
        begin_step(here.run, here.engine, 0)
        here.engine.train_step(here.feed.next_step())
        offload = cast(Any, here.engine.module).offload
        assert offload.host_bytes == 0, "nothing waits when a step is over"
        most = offload.peak_host_bytes
    return record_raw(raw, steps), most


@pytest.mark.ranks
@everyday("dp2-zero3", "experts")
@pytest.mark.parametrize("cell", OFFLOADED)
def test_activations_may_wait_on_the_host_in_every_layout(
    ranks: RankPool, corpus: str, out: Path, cell: str
) -> None:
    """The same to the last bit, dropout included."""
    world_size, layout, mode = OFFLOADED[cell]
    recompute = {"mode": mode, "offload": True, "offload_above_bytes": 0}
    kept = ranks.run(record_raw, world_size, tiny(corpus, out, **layout, **DROPOUT, recompute=mode), 3)[0]
    raw = tiny(corpus, out, **layout, **DROPOUT, recompute=recompute)
    found = ranks.run(record_offloaded, world_size, raw, 3)
    difference = compare(found[0][0], kept)
    worst = max(difference.loss, difference.grad_norm, difference.gradient, difference.weights)
    assert worst == 0.0, difference
    assert all(most > 0 for _, most in found), "every rank has layers whose activations wait"


@pytest.mark.ranks
@everyday("tp2")
@pytest.mark.parametrize(
    "layout",
    [
        {**PP, "layout": {"pp": 2, "schedule": "zb-v", "chunks": 2}},
        {**PP, "layout": {"pp": 2, "schedule": "interleaved", "chunks": 2}, "recompute": "full"},
        DP_ZERO_3,
        {"layout": {"tp": 2}, "model__attention_dropout": 0.0},  # tensor ranks hold different heads
    ],
    ids=["zb-v", "interleaved-recompute", "dp2-zero3", "tp2"],
)
def test_dropout_goes_with_samples_and_layers_whatever_the_layout(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, layout: dict[str, Any]
) -> None:
    dropout = {**DROPOUT, **{key: value for key, value in layout.items() if key.startswith("model")}}
    trace = ranks.run(record_raw, 2, tiny(corpus, out, **{**dropout, **layout}), STEPS)[0]
    reference = one_process(STEPS, **dropout)
    assert_same(trace, reference)
    plain = one_process(STEPS)
    apart = max(abs(a - b) for a, b in zip(reference.losses, plain.losses, strict=True))
    assert apart > 1e-3, "dropout must bite in this test"


@pytest.mark.ranks
@pytest.mark.thorough
@LAYOUTS
@pytest.mark.parametrize(
    "model",
    [GPT2, WINDOW],
    ids=["gpt2-like", "window-relu2-nope"],
)
def test_other_architectures_are_the_same_in_every_layout(
    ranks: RankPool,
    corpus: str,
    one_process: OneProcess,
    out: Path,
    layout: dict[str, Any],
    model: dict[str, Any],
) -> None:
    trace = ranks.run(record_raw, 2, tiny(corpus, out, **layout, **model), STEPS)[0]
    assert_same(trace, one_process(STEPS, **model))


@pytest.mark.ranks
@everyday("[0, 2, 7]")
@pytest.mark.parametrize("bounds", ["parameters", "uniform", [0, 2, 7]], ids=str)
def test_where_the_pipeline_is_cut_changes_nothing(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, bounds: Any
) -> None:
    raw = tiny(corpus, out, layout={"pp": 2, "partition": bounds}, deepspeed="pipeline.json")
    assert_same(ranks.run(record_raw, 2, raw, STEPS)[0], one_process(STEPS))


@pytest.mark.ranks
@everyday("{}", "{'precision': 'bf16'}")
@pytest.mark.parametrize(
    "changes", [{}, {"deepspeed": "zero0.json"}, {"precision": "bf16"}, {"deepspeed": "zero2.json"}], ids=str
)
def test_stages_without_norms_go_with_others(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, changes: dict[str, Any]
) -> None:
    """An embedding alone, and a head alone: DeepSpeed's norms, group by group, waited for the missing one for ever."""
    model = {"model__tie_embeddings": False}
    layout = {"layout": {"pp": 4, "partition": [0, 1, 4, 6, 7]}, "deepspeed": "pipeline.json"}
    trace = ranks.run(record_raw, 4, tiny(corpus, out, **{**model, **layout, **changes}), STEPS)[0]
    wanted = one_process(STEPS, **model)
    if "precision" in changes:
        assert trace.grad_norms == pytest.approx(wanted.grad_norms, rel=2e-2)
    else:
        assert_same(trace, wanted)


@pytest.mark.ranks
@everyday("2")
@pytest.mark.parametrize("world_size", [2, 4])
def test_without_clipping_pipelines_of_all_lengths_agree(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, world_size: int
) -> None:
    """DeepSpeed reads a missing gradient_clipping as 1.0; ours is written out, so 0 means none."""
    changes = {"optimizer__gradient_clipping": 0.0}
    raw = tiny(corpus, out, layout={"pp": world_size}, **{"deepspeed": "zero0.json", **changes})
    reference = one_process(STEPS, **changes)
    assert_same(ranks.run(record_raw, world_size, raw, STEPS)[0], reference)
    clipped = one_process(STEPS)
    assert abs(reference.losses[-1] - clipped.losses[-1]) > 1e-6, "clipping at 0.5 must bite in this test"
