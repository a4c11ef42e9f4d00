"""Validation losses are the same in every layout, with any micro-batch size, and change nothing in training."""

from pathlib import Path
from typing import Any

import pytest

from model_providers.random_streams import seed_streams
from pretrain.evaluate import evaluate_all
from tests.opened import opened
from tests.ranks import RankPool
from tests.runs import make_corpus, tiny
from tests.thorough import rare

Losses = tuple[dict[str, float], list[float]]  # by validation set, and of training


def evaluate_and_train(raw: dict[str, Any], *, evaluate_first: bool = True) -> Losses:
    """Validation losses of the initial weights, then the losses of two steps, evaluating between them."""
    with opened(raw) as here:
        engine, data, run = here.engine, here.data, here.run
        losses_by_set = evaluate_all(engine, data.validation, run) if evaluate_first else {}
        losses = []
        for step in range(2):
            seed_streams(1, step=step)  # as the loop does
            losses.append(engine.train_step(here.feed.next_step()).loss)
            if evaluate_first:
                evaluate_all(engine, data.validation, run)
    return losses_by_set, losses


@pytest.fixture(scope="module")
def named_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    return {
        name: make_corpus(folder, name=name, num_documents=30, seed=seed)
        for name, seed in (("prose", 1), ("verse", 2))
    }


@pytest.fixture(scope="module")
def reference(
    ranks: RankPool, corpus: str, named_sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Losses:
    """Of one process."""
    base = {"data__validation": named_sets, "train__eval_samples": 10, "deepspeed": "zero0.json"}
    found: list[Losses] = ranks.run(
        evaluate_and_train, 1, tiny(corpus, tmp_path_factory.mktemp("reference"), **base)
    )
    return found[0]


@pytest.mark.ranks
@rare(
    "None-dp2",
    "None-tp2+sp",
    "None-pp2-dp2",
    "None-zb-v",
    "None-interleaved",
    "1-dp2",
    "1-dp2-zero3",
    "1-pp2",
    "1-pp2-dp2",
    "1-zb-v",
    "3-dp2-zero3",
    "3-tp2+sp",
    "3-pp2",
    "3-interleaved",
)
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {"deepspeed": "zero2.json"}),
        (2, {"deepspeed": "zero3.json"}),
        (2, {"layout": {"tp": 2, "sequence_parallel": True}}),
        (2, {"layout": {"pp": 2}, "deepspeed": "pipeline.json"}),
        (4, {"layout": {"pp": 2}, "deepspeed": "pipeline.json"}),
        (2, {"layout": {"pp": 2, "chunks": 2, "schedule": "zb-v"}, "deepspeed": "pipeline.json"}),
        (2, {"layout": {"pp": 2, "chunks": 3, "schedule": "interleaved"}, "deepspeed": "pipeline.json"}),
    ],
    ids=["dp2", "dp2-zero3", "tp2+sp", "pp2", "pp2-dp2", "zb-v", "interleaved"],
)
@pytest.mark.parametrize("micro_size", [None, 1, 3])
def test_validation_losses_do_not_depend_on_the_layout(
    ranks: RankPool,
    corpus: str,
    named_sets: dict[str, str],
    reference: Losses,
    out: Path,
    world_size: int,
    changes: dict[str, Any],
    micro_size: int | None,
) -> None:
    """10 samples fill no step of 4 or 6: fillers must not count. Under a pipeline, shapes change and change back."""
    base = {"data__validation": named_sets, "train__eval_samples": 10}
    raw = tiny(corpus, out, **base, **changes, train__eval_micro_size=micro_size)
    for losses_by_set, losses in ranks.run(evaluate_and_train, world_size, raw):
        assert losses_by_set == pytest.approx(reference[0], rel=1e-6)
        assert losses == pytest.approx(reference[1], rel=1e-6)
    assert set(reference[0]) == {"valid", "prose", "verse"}
    assert len(set(reference[0].values())) == 3


OBJECTIVES: dict[str, dict[str, Any]] = {
    "bert": {"model": {"preset": "tiny-bert", "vocab_size": None}, "data__objective": "mlm"},
    "t5": {"model": {"preset": "tiny-t5", "vocab_size": None}, "data__objective": "span_corruption"},
    "prefix": {"model__attention": "prefix", "data__objective": "prefix_lm"},
}


@pytest.mark.ranks
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_agree_on_what_counts_where_only_some_ranks_have_fillers(
    ranks: RankPool, corpus: str, out: Path, objective: str
) -> None:
    """7 samples on 2 ranks of 2: the last is a filler on the second rank, and the first must know of it."""
    base = {**OBJECTIVES[objective], "train__eval_samples": 7}
    reference = ranks.run(evaluate_and_train, 1, tiny(corpus, out, **base))[0]
    for losses_by_set, losses in ranks.run(evaluate_and_train, 2, tiny(corpus, out, **base)):
        assert losses_by_set == pytest.approx(reference[0], rel=1e-6)
        assert losses == pytest.approx(reference[1], rel=1e-6)


@pytest.mark.ranks
def test_evaluating_changes_nothing_in_training_with_dropout(ranks: RankPool, corpus: str, out: Path) -> None:
    raw = tiny(corpus, out, model__hidden_dropout=0.2)
    with_evaluation = ranks.run(evaluate_and_train, 1, raw)[0]
    without = ranks.run(_train_only, 1, raw)[0]
    assert with_evaluation[1] == without[1]


def _train_only(raw: dict[str, Any]) -> tuple[dict[str, float], list[float]]:
    return evaluate_and_train(raw, evaluate_first=False)
