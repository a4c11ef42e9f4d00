"""A dense model becomes one with experts and computes the same at first, in any layout."""

from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import store
from pretrain.evaluate import evaluate_all
from tests.opened import opened
from tests.pretrain.test_resume import eight, refused, train
from tests.ranks import RankPool


def first_validation(raw: dict[str, Any]) -> float:
    with opened(raw) as here:
        return evaluate_all(here.engine, here.data.validation, here.run)["valid"]


@pytest.fixture(scope="module")
def dense(ranks: RankPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dense run of 8 steps: its MLPs are 64 wide."""
    raw = eight(corpus, tmp_path_factory.mktemp("dense"), layout={"tp": 2, "sequence_parallel": True})
    ranks.run(train, 2, raw)
    return raw


def upcycled(dense: dict[str, Any], moe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    folder = Path(dense["out"]) / dense["name"]
    checkpoint = {"weights_from": str(folder), "upcycle": True}
    plain = {key: value for key, value in dense.items() if key != "layout"}
    return {
        **plain,
        "name": "up",
        "model": {**dense["model"], "moe": moe},
        "checkpoint": checkpoint,
        **changes,
    }


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("moe", "world_size", "changes"),
    [
        ({"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64}, 1, {}),
        (
            {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "first_dense": 1, "every": 2},
            2,
            {"layout": {"ep": 2}},
        ),
        (
            {"num_experts": 8, "top_k": 4, "ffn_hidden_size": 32, "shared_ffn_hidden_size": 16},
            2,
            {"layout": {"ep": 2}, "deepspeed": "zero3.json"},
        ),
        (
            {
                "num_experts": 8,
                "top_k": 2,
                "ffn_hidden_size": 32,
                "score": "sigmoid",
                "bias_update_rate": 0.01,
                "scaling_factor": 2.5,
            },
            4,
            {"layout": {"pp": 2, "tp": 2, "sequence_parallel": True, "ep": 2, "etp": 1}},
        ),
    ],
    ids=["copies", "some layers", "parts", "sigmoid parts in a pipeline"],
)
def test_it_begins_where_the_dense_model_ended(
    ranks: RankPool, dense: dict[str, Any], moe: dict[str, Any], world_size: int, changes: dict[str, Any]
) -> None:
    folder = store.checkpoints(Path(dense["out"]) / "tiny" / "checkpoints")[0]
    alone = {**dense, "layout": {}, "checkpoint": {"weights_from": str(folder)}}
    wanted = ranks.run(first_validation, 1, alone)[0]
    untrained = ranks.run(first_validation, 1, {**alone, "checkpoint": {}})[0]
    found = ranks.run(first_validation, world_size, upcycled(dense, moe, **changes))[0]
    assert found == pytest.approx(wanted, rel=1e-5) and abs(untrained - wanted) > 1e-3


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48}, "is 64 wide in .*; use 64 or 32"),
        ({"num_experts": 6, "top_k": 3, "ffn_hidden_size": 32}, "top_k=3; use 64"),
        (
            {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "normalize_top_k": False},
            "use normalize_top_k=true",
        ),
    ],
)
def test_experts_that_no_mlp_makes_are_refused(
    ranks: RankPool, dense: dict[str, Any], moe: dict[str, Any], message: str
) -> None:
    import re

    assert re.search(message, ranks.run(refused, 1, upcycled(dense, moe))[0])


@pytest.mark.ranks
def test_only_a_dense_model_is_upcycled(
    ranks: RankPool, dense: dict[str, Any], corpus: str, tmp_path: Path
) -> None:
    moe = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64}
    raw = eight(corpus, tmp_path, model__moe=moe)
    ranks.run(train, 1, raw, 1)
    again = upcycled(dense, moe, checkpoint={"weights_from": str(tmp_path / "tiny"), "upcycle": True})
    assert "it has experts already" in ranks.run(refused, 1, again)[0]
    without = {**again, "checkpoint": {"upcycle": True}}
    assert "give checkpoint.weights_from" in ranks.run(refused, 1, without)[0]
