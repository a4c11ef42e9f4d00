"""Runs in eight bits: from which step on, across stops with and without, and whether they learn."""

from pathlib import Path
from typing import Any

import pytest

from model_providers.fp8.config import RECIPES
from tests.parity.record import record_raw
from tests.parity.test_fp8 import of
from tests.pretrain.test_resume import eight, steps, train
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import cells, rare


@pytest.mark.ranks
def test_eight_bits_begin_with_their_first_step(ranks: RankPool, corpus: str, out: Path) -> None:
    plain, later, always = (
        ranks.run(record_raw, 1, tiny(corpus, out, fp8=fp8), 4)[0]
        for fp8 in (None, of("current", start_step=2), of("current"))
    )
    assert later.losses[:2] == plain.losses[:2] and later.losses[2] != plain.losses[2]
    assert always.losses[0] != plain.losses[0]


@pytest.mark.ranks
def test_past_scales_begin_with_the_first_step_in_eight_bits(ranks: RankPool, corpus: str, out: Path) -> None:
    """Steps before it have seen nothing, which is no reason to scale by 1 and lose all gradients."""
    plain, later = (
        ranks.run(record_raw, 1, tiny(corpus, out, fp8=fp8, train__steps=4), 4)[0]
        for fp8 in (None, of("delayed", start_step=2))
    )
    assert later.grad_norms[:2] == plain.grad_norms[:2] and later.losses[2] != plain.losses[2]
    assert later.grad_norms[2] == pytest.approx(plain.grad_norms[2], rel=0.05)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "before, after",
    [
        (None, of("delayed")),
        (of("delayed"), None),
        (of("delayed"), of("blockwise")),
        (of("mxfp8"), of("delayed")),
    ],
    ids=["on", "off", "delayed-to-blockwise", "mxfp8-to-delayed"],
)
def test_a_run_goes_on_in_another_format(
    ranks: RankPool, corpus: str, out: Path, before: Any, after: Any
) -> None:
    """What one recipe remembers is no part of the weights: a checkpoint with or without it serves any other."""
    raw = eight(corpus, out, precision="bf16")
    first = ranks.run(train, 1, {**raw, "fp8": before}, 3)[0]
    second = ranks.run(train, 1, steps({**raw, "fp8": after}, 5))[0]
    assert len(first[0]) == 3 and len(second[0]) == 2
    assert second[0][-1] < first[0][0]


@pytest.mark.ranks
@rare("nvfp4")
@pytest.mark.parametrize("recipe", cells(RECIPES, thorough=("current", "mxfp8")))
def test_a_run_learns_in_eight_bits_what_it_learns_in_sixteen(
    ranks: RankPool, corpus: str, out: Path, recipe: str
) -> None:
    """The demo's model over 300 steps: benchmarks/fp8_loss.py."""
    trace, wide = (
        ranks.run(record_raw, 1, tiny(corpus, out, precision="bf16", fp8=fp8, deepspeed="zero1.json"), 20)[0]
        for fp8 in (of(recipe), None)
    )
    assert wide.losses[-1] < wide.losses[0] - 0.5
    assert trace.losses[-1] == pytest.approx(wide.losses[-1], rel=0.03 if recipe == "nvfp4" else 0.01)


@pytest.mark.ranks
def test_past_scales_of_shared_out_experts_are_remembered_bit_for_bit(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    """A rank holds half of the experts, and the first rank of a stage writes what all of them have seen."""
    moe = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32}
    changes = {"fp8": of("delayed"), "model__moe": moe, "layout": {"ep": 2}, "deepspeed": "moe.json"}
    through = ranks.run(train, 2, eight(corpus, tmp_path / "through", **changes))[0]
    raw = eight(corpus, tmp_path / "stopped", **changes)
    first, second = ranks.run(train, 2, raw, 3)[0], ranks.run(train, 2, raw)[0]
    assert first[0] + second[0] == through[0] and first[1] + second[1] == through[1]
