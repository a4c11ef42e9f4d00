"""Runs with experts stop, go on, and hand their weights over to any other layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint import store
from pretrain.checkpoint.fit import check_before_start
from pretrain.config_io import make_run
from pretrain.errors import RunError
from pretrain.parity import Tensors
from tests.pretrain.test_resume import eight, go_on, refused, train
from tests.ranks import RankPool
from tests.thorough import cells, rare

MOE = {
    "num_experts": 4,
    "top_k": 2,
    "ffn_hidden_size": 24,
    "shared_ffn_hidden_size": 16,
    "score": "sigmoid",
    "bias_update_rate": 0.02,
    "sequence_aux_loss": 0.01,
    "jitter": 0.01,
}
MODEL = {"model__moe": MOE, "model__num_layers": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"deepspeed": "zero0.json"}),
    "ep2": (2, {"layout": {"ep": 2}}),
    "ep2-bf16": (2, {"layout": {"ep": 2}, "precision": "bf16"}),
    "ep2-dp2-zero2": (4, {"layout": {"ep": 2}, "deepspeed": "zero2.json"}),
    "ep2-zero3": (2, {"layout": {"ep": 2}, "deepspeed": "zero3.json"}),
    "ep2-cpu": (2, {"layout": {"ep": 2}, "deepspeed": "zero2_cpu_offload.json"}),
    "pp2-ep2": (4, {"layout": {"pp": 2, "ep": 2}, "precision": "bf16"}),
    "tp2-ep4": (4, {"layout": {"tp": 2, "sequence_parallel": True, "ep": 4, "etp": 1}}),
    "tp2-ep2-etp2": (4, {"layout": {"tp": 2, "sequence_parallel": True, "ep": 2, "etp": 2}}),
}


@pytest.mark.ranks
@rare("ep2", "tp2-ep2-etp2")
@pytest.mark.parametrize(
    "layout", cells(list(LAYOUTS)[1:], thorough=["ep2-bf16", "ep2-dp2-zero2", "ep2-cpu", "tp2-ep4"])
)
def test_resuming_equals_running_through_bit_for_bit(
    ranks: RankPool, corpus: str, tmp_path: Path, layout: str
) -> None:
    world_size, changes = LAYOUTS[layout]
    through = ranks.run(train, world_size, eight(corpus, tmp_path / "through", **MODEL, **changes))[0]
    raw = eight(corpus, tmp_path / "stopped", **MODEL, **changes)
    first = ranks.run(train, world_size, raw, 5)[0]
    second = ranks.run(train, world_size, raw)[0]
    assert first[0] + second[0] == through[0] and first[1] + second[1] == through[1]
    assert through[2].keys() == second[2].keys()
    assert all(torch.equal(second[2][name], through[2][name]) for name in through[2])


def end_of(raw: dict[str, Any]) -> tuple[Tensors, Tensors]:
    """Weights of the whole model and the routers' biases after a run, as its last checkpoint has them."""
    from pretrain.checkpoint.weights import WeightFolder

    run = make_run(raw, world_size=dist.get_world_size())
    go_on(run, None, Silent())
    if dist.get_rank():
        return {}, {}
    source = WeightFolder(store.checkpoints(run.folder / "checkpoints")[0] / store.WEIGHTS)
    state = {f"{name}.{key}": tensor for name in source.files for key, tensor in source.layer(name)}
    biases = {name: tensor for name, tensor in state.items() if name.endswith("expert_bias")}
    return {name: tensor for name, tensor in state.items() if name not in biases}, biases


class Silent:
    def write(self, record: Any) -> None: ...

    def close(self) -> None: ...


@pytest.mark.ranks
@rare("tp2-ep2-etp2")
@pytest.mark.parametrize("layout", ["ep2-zero3", "tp2-ep2-etp2", "pp2-ep2"])
def test_weights_and_biases_of_any_layout_start_a_run_of_any_other(
    ranks: RankPool, corpus: str, tmp_path: Path, layout: str
) -> None:
    world_size, changes = LAYOUTS[layout]
    weights, biases = ranks.run(end_of, world_size, eight(corpus, tmp_path / "from", **MODEL, **changes))[0]
    assert len(biases) == 2 and all(bias.abs().max() > 0.01 for bias in biases.values())
    folder = store.checkpoints(tmp_path / "from" / "tiny" / "checkpoints")[0]
    for other in ("one", "ep2", "tp2-ep4"):
        size, layout_changes = LAYOUTS[other]
        raw = eight(
            corpus, tmp_path / other, checkpoint={"weights_from": str(folder)}, **MODEL, **layout_changes
        )
        raw["train"] = {**raw["train"], "steps": 1}
        raw["optimizer"] = {**raw["optimizer"], "lr": 1e-30, "weight_decay": 0.0}
        raw["model"] = {**raw["model"], "moe": {**MOE, "bias_update_rate": 1e-30}}
        started, their_biases = ranks.run(end_of, size, raw)[0]
        assert started.keys() == weights.keys()
        assert all(torch.equal(started[key].float(), weights[key].float()) for key in weights)
        assert all((their_biases[key] - biases[key]).abs().max() < 1e-20 for key in biases)


@pytest.mark.ranks
def test_another_sharing_of_experts_is_refused_naming_both(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    raw = eight(corpus, tmp_path, **MODEL, **LAYOUTS["ep2"][1])
    ranks.run(train, 2, raw, 2)
    message = ranks.run(refused, 2, {**raw, "layout": {}})[0]
    assert "ep=2 etp=1" in message and "checkpoint.weights_from=" in message


@pytest.mark.ranks
def test_a_run_goes_on_with_other_coefficients_and_not_with_other_experts(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    raw = eight(corpus, tmp_path, **MODEL, **LAYOUTS["ep2"][1])
    ranks.run(train, 2, raw, 3)

    def with_moe(**facts: Any) -> dict[str, Any]:
        return {**raw, "model": {**raw["model"], "hidden_dropout": 0.2, "moe": {**MOE, **facts}}}

    losses, _, _ = ranks.run(
        train, 2, with_moe(sequence_aux_loss=0.5, capacity_factor=2.0, bias_update_rate=0.1)
    )[0]
    assert len(losses) == 5
    message = ranks.run(refused, 2, with_moe(top_k=1))[0]
    assert "holds another model: model.moe.top_k=1 (checkpoint: 2); put that back" in message
    assert "checkpoint.weights_from=" in message


@pytest.mark.ranks
def test_checkpoints_are_judged_before_the_start(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    """By what lies on disk, without a rank."""
    dense = eight(corpus, tmp_path, name="dense", model__num_layers=2)
    ranks.run(train, 2, dense, 2)
    moe = eight(corpus, tmp_path, name="moe", **MODEL, **LAYOUTS["ep2"][1])
    ranks.run(train, 2, moe, 2)

    def judged(raw: dict[str, Any], world_size: int = 2) -> None:
        check_before_start(make_run(raw, world_size=world_size))

    judged(dense)
    with pytest.raises(RunError, match=r"was written with tp=1 pp=1 dp=2 .*this run has tp=2"):
        judged({**dense, "layout": {"tp": 2}})
    with pytest.raises(RunError, match=r"model\.num_layers=3 \(checkpoint: 2\)"):
        judged({**dense, "model": {**dense["model"], "num_layers": 3}})

    def begun(name: str, source: str, **more: Any) -> dict[str, Any]:
        raw = moe if name == "moe" else dense
        return {**raw, "name": "new", "checkpoint": {"weights_from": str(tmp_path / source), **more}}

    judged(begun("moe", "moe"))
    judged(begun("moe", "dense", upcycle=True))
    with pytest.raises(RunError, match=r"a dense model, .*checkpoint\.upcycle=true"):
        judged(begun("moe", "dense"))
    with pytest.raises(RunError, match=r"it has experts already; leave checkpoint\.upcycle out"):
        judged(begun("moe", "moe", upcycle=True))
    with pytest.raises(RunError, match=r"it has experts, and this model has none"):
        judged(begun("dense", "moe"))


@pytest.mark.ranks
def test_a_bias_that_was_not_there_begins_at_zero(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    without = {**MOE, "bias_update_rate": 0.0}
    raw = eight(corpus, tmp_path, **{**MODEL, "model__moe": without}, **LAYOUTS["ep2"][1])
    ranks.run(train, 2, raw, 2)
    later = eight(
        corpus, tmp_path, name="later", checkpoint={"weights_from": str(tmp_path / "tiny")}, **MODEL
    )
    later["train"] = {**later["train"], "steps": 1}
    _, biases = ranks.run(end_of, 1, later)[0]
    assert all(0 < bias.abs().max() <= MOE["bias_update_rate"] * 1.01 for bias in biases.values())  # type: ignore[operator]
