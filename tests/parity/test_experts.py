"""Experts in every layout compute what one process does, expert by expert."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import OneProcess
from tests.parity.agreement import assert_same
from tests.parity.models import DEEPSEEK, MOE
from tests.parity.record import record_raw
from tests.ranks import RankError, RankPool
from tests.runs import tiny
from tests.thorough import everyday, rare

STEPS = 3


class Cell(NamedTuple):
    """One layout of the suite."""

    world_size: int
    ep: int
    zero: int = 1
    tp: int = 1
    pp: int = 1
    etp: int | None = None
    schedule: str = "1f1b"
    chunks: int = 1
    dispatcher: str = "alltoall"
    partition: tuple[int, ...] | None = None
    first_dense: int = 0  # with a partition: a stage without experts

    def __str__(self) -> str:
        dp = self.world_size // (self.tp * self.pp)
        shared = f"ep{self.ep}" + (f"-etp{self.etp}" if self.etp else "")
        pipeline = f"-pp{self.pp}-{self.schedule}" if self.pp > 1 else ""
        return f"{shared}-tp{self.tp}{pipeline}-dp{dp}-zero{self.zero}" + f"-{self.dispatcher}"[:10]

    def changes(self) -> dict[str, Any]:
        layout: dict[str, Any] = {"ep": self.ep, "etp": self.etp, "dispatcher": self.dispatcher}
        if self.tp > 1:
            layout |= {"tp": self.tp, "sequence_parallel": True}
        if self.pp > 1:
            layout |= {"pp": self.pp, "schedule": self.schedule, "chunks": self.chunks}
        if self.partition:
            layout["partition"] = list(self.partition)
        json = "moe.json" if self.zero == 1 and self.ep > 1 else f"zero{self.zero}.json"
        return {"layout": layout, "deepspeed": json}


CELLS = (
    Cell(2, 1, zero=0),
    Cell(2, 2, zero=1),
    Cell(2, 2, zero=2),
    Cell(2, 2, zero=3),
    Cell(4, 2, zero=1),
    Cell(4, 2, zero=2),
    Cell(4, 2, zero=3),
    Cell(4, 4, zero=1),
    Cell(2, 2, zero=1, dispatcher="allgather"),
    Cell(2, 1, tp=2),
    Cell(2, 2, tp=2, etp=1),
    Cell(4, 2, tp=2, etp=1, zero=2),
    Cell(4, 2, tp=2, etp=1, zero=3),
    Cell(4, 4, tp=2, etp=1),
    Cell(4, 2, tp=2, etp=2),
    Cell(4, 2, tp=2, etp=2, zero=2, dispatcher="allgather"),
    Cell(2, 1, pp=2),
    Cell(4, 2, pp=2),
    Cell(4, 2, pp=2, schedule="zb-v", chunks=2),
    Cell(4, 2, pp=2, schedule="interleaved", chunks=2),
    Cell(4, 2, tp=2, etp=1, pp=2, schedule="zb-h1"),
    Cell(4, 2, pp=2, partition=(0, 2, 6), first_dense=1),
)


@pytest.mark.ranks
@everyday("1")
@pytest.mark.parametrize("zero", [1, 3])
def test_sharing_out_experts_changes_nothing_expert_by_expert_over_20_steps(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, zero: int
) -> None:
    model = {"model__moe": MOE, "model__tie_embeddings": False}
    shared_out = {"layout": {"ep": 2}, "deepspeed": f"zero{zero}.json"}
    trace = ranks.run(record_raw, 2, tiny(corpus, out, **model, **shared_out), 20)[0]
    reference = one_process(20, **model)
    assert_same(trace, reference)
    for name, wanted in reference.gradients.items():
        if ".experts." in name:
            for expert, (mine, theirs) in enumerate(zip(trace.gradients[name], wanted, strict=True)):
                assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max(), f"{name}, expert {expert}"
    assert reference.losses[-1] < reference.losses[0] - 0.1, "the reference itself must learn"


OPTIONS = {
    "sigmoid-groups-bias": {
        "score": "sigmoid",
        "num_groups": 2,
        "group_top_k": 1,
        "bias_update_rate": 0.01,
        "scaling_factor": 2.0,
        "shared_gate": True,
        "shared_ffn_hidden_size": 16,
    },
    "softmax-of-all": {"normalize_top_k": False, "sequence_aux_loss": 0.01},
    "global-loss": {"global_aux_loss": 0.05},
    "capacity": {"capacity_factor": 1.0, "drop": "probs", "jitter": 0.05},
    "padded": {"capacity_factor": 1.0, "drop": "position", "pad_to_capacity": True},
    "some-layers": {"first_dense": 1, "every": 2},
}


@pytest.mark.ranks
@everyday(
    "sigmoid-groups-bias-alltoall",
    "softmax-of-all-allgather",
    "global-loss-alltoall",
    "capacity-alltoall",
    "padded-alltoall",
    "some-layers-allgather",
)
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_kind_of_routing_is_the_same_with_shared_out_experts(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, option: str, dispatcher: str
) -> None:
    """A micro-batch a step, so that what is counted over a step is the same for two replicas as for one of them."""
    if option == "padded" and dispatcher == "allgather":
        pytest.skip("megatron-core pads in all-to-alls only")
    moe = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24, **OPTIONS[option]}
    one_size = 4 if option == "global-loss" else 2
    common = {"model__moe": moe, "batch": {"global_size": 4, "micro_size": 2}}
    trace = ranks.run(
        record_raw, 2, tiny(corpus, out, **common, layout={"ep": 2, "dispatcher": dispatcher}), STEPS
    )[0]
    alone = {**common, "batch": {"global_size": 4, "micro_size": one_size}}
    assert_same(trace, one_process(STEPS, **alone))


@pytest.mark.ranks
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {"layout": {"ep": 2}}),
        (2, {"layout": {"ep": 2}, "deepspeed": "zero3.json"}),
        (2, {"layout": {"tp": 2, "sequence_parallel": True}}),
        (4, {"layout": {"tp": 2, "sequence_parallel": True, "ep": 4, "etp": 1}, "deepspeed": "zero2.json"}),
        (2, {"layout": {"pp": 2}, "deepspeed": "pipeline.json"}),
        (2, {"layout": {"pp": 2, "partition": [0, 2, 8]}, "recompute": "full"}),
        (4, {"layout": {"pp": 2, "ep": 2, "schedule": "zb-v", "chunks": 2}}),
        (4, {"layout": {"pp": 2, "tp": 2, "sequence_parallel": True, "schedule": "zb-h1"}}),
        (4, {"layout": {"pp": 4, "schedule": "1f1b", "partition": [0, 2, 5, 6, 7]}}),
    ],
    ids=lambda value: str(value).replace(" ", "") if isinstance(value, dict) else str(value),
)
def test_latent_attention_experts_and_looking_ahead_in_every_layout(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, world_size: int, changes: dict[str, Any]
) -> None:
    model = {**DEEPSEEK, "model__mtp": {"depth": 2}} if changes["layout"].get("pp") == 2 else DEEPSEEK
    trace = ranks.run(record_raw, world_size, tiny(corpus, out, **model, **changes), STEPS)[0]
    assert_same(trace, one_process(STEPS, **model))


PARTS = {
    "whole experts": ["core_attn", "layernorm", "mlp", "moe", "mla_up_proj"],
    "inside experts": ["moe_act", "shared_experts", "mla_up_proj", "layernorm"],
}


@pytest.mark.ranks
@everyday("inside-tp2+sp")
@pytest.mark.parametrize(
    ("parts", "world_size", "changes"),
    [
        ("whole experts", 2, {"layout": {"ep": 2}, "deepspeed": "zero3.json"}),
        ("inside experts", 2, {"layout": {"tp": 2, "sequence_parallel": True}}),
        ("inside experts", 2, {"layout": {"pp": 2, "schedule": "zb-v", "chunks": 2}}),
        ("whole experts", 4, {"layout": {"pp": 2, "ep": 2, "schedule": "zb-v", "chunks": 2}}),
    ],
    ids=["whole-ep2-zero3", "inside-tp2+sp", "inside-pp2-zb-v", "whole-pp2-ep2-zb-v"],
)
def test_forgotten_parts_of_experts_and_latent_attention_come_back_in_every_layout(
    ranks: RankPool,
    corpus: str,
    one_process: OneProcess,
    out: Path,
    parts: str,
    world_size: int,
    changes: dict[str, Any],
) -> None:
    recompute = {"recompute": {"mode": "selective", "modules": PARTS[parts]}}
    raw = tiny(corpus, out, **DEEPSEEK, **changes, **recompute)
    assert_same(ranks.run(record_raw, world_size, raw, STEPS)[0], one_process(STEPS, **DEEPSEEK))


@pytest.mark.ranks
@everyday("2-{'layout':{'ep':2},'deepspeed':'zero2_cpu_offload.json'}")
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {"layout": {"ep": 2}}),
        (4, {"layout": {"ep": 2}, "deepspeed": "zero2.json"}),
        (4, {"layout": {"tp": 2, "sequence_parallel": True, "ep": 4, "etp": 1}}),
        (4, {"layout": {"pp": 2, "ep": 2, "schedule": "zb-v", "chunks": 2}}),
        (4, {"layout": {"pp": 2, "ep": 2, "partition": [0, 2, 6]}, "model__moe__first_dense": 1}),
        (2, {"layout": {"ep": 2}, "deepspeed": "zero2_cpu_offload.json"}),
    ],
    ids=lambda value: str(value).replace(" ", "") if isinstance(value, dict) else str(value),
)
def test_bf16_experts_follow_fp32(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, world_size: int, changes: dict[str, Any]
) -> None:
    """All experts are chosen, so that no rounding sends a token elsewhere; norms count each expert once."""
    model = {"model__moe": {**MOE, "top_k": 4}, "model__num_layers": 3}
    model |= {key: changes[key] for key in changes if key.startswith("model")}
    raw = tiny(corpus, out, **{**model, **changes}, precision="bf16")
    trace = ranks.run(record_raw, world_size, raw, STEPS)[0]
    wanted = one_process(STEPS, **model)
    assert trace.losses == pytest.approx(wanted.losses, rel=5e-3)
    assert trace.grad_norms == pytest.approx(wanted.grad_norms, rel=2e-2)


@pytest.mark.ranks
@everyday("ep4-tp1-dp4-zero1-alltoall", "ep2-tp1-pp2-1f1b-dp2-zero1-alltoall1")
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_layout_computes_what_one_process_does(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, cell: Cell
) -> None:
    model = {"model__moe": {**MOE, "first_dense": cell.first_dense}, "model__num_layers": 3}
    raw = tiny(corpus, out, **model, **cell.changes())
    trace = ranks.run(record_raw, cell.world_size, raw, STEPS)[0]
    assert_same(trace, one_process(STEPS, **model))


def record_on_two_machines(raw: dict[str, Any], steps: int) -> Any:
    """As the launcher tells ranks 0 and 1 on one machine, 2 and 3 on another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        return record_raw(raw, steps)


@pytest.mark.ranks
@rare("dp")
@pytest.mark.parametrize("tensor", [{}, {"tp": 2, "sequence_parallel": True, "etp": 1}], ids=["dp", "tp"])
def test_tokens_that_go_inside_the_machine_first_come_to_the_same(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, tensor: dict[str, Any]
) -> None:
    model = {"model__moe": MOE}
    raw = tiny(corpus, out, **model, layout={"ep": 4, "dispatcher": "hierarchical", **tensor})
    assert_same(ranks.run(record_on_two_machines, 4, raw, STEPS)[0], one_process(STEPS, **model))


@pytest.mark.ranks
def test_a_single_machine_has_no_inside(ranks: RankPool, corpus: str, out: Path) -> None:
    raw = tiny(corpus, out, model__moe=MOE, layout={"ep": 2, "dispatcher": "hierarchical"})
    with pytest.raises(
        RankError, match=r"layout\.dispatcher=hierarchical: the layout\.ep=2 ranks.*use alltoall"
    ):
        ranks.run(record_raw, 2, raw, 1)
