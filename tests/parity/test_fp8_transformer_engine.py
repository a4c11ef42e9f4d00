"""Transformer Engine's FP8 in every layout, through a stand-in of its state machine: the numbers of one process.

The scales are delayed ones, which is the recipe with a state: one that changed within a step, on one rank only or in a
recomputed pass, would change what numbers are rounded to, and the losses with it.  Number format and optimizer are
those of test_fp8.py, in which the order of sums does not matter.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from model_providers import building
from model_providers.fp8 import choice
from pretrain.parity import Trace
from tests.model_providers.te_stand_in import stand_in
from tests.parity.agreement import assert_same
from tests.parity.record import record_fp64
from tests.parity.test_fp8 import EXACT, TOLERANCE, apart
from tests.pretrain import test_resume
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import cells, rare

STEPS = 4
FP8 = {"recipe": "delayed", "backend": "auto", "amax_history": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    # Its first scales are 1, so gradients of the first steps round by how many micro-batches share a loss: one rank.
    "zero2-recompute": (1, {"deepspeed": "zero2.json", "recompute": "full"}),
    "zero3-recompute": (1, {"deepspeed": "zero3.json", "recompute": "full"}),
    "pp2": (2, {"layout": {"pp": 2}, "deepspeed": "pipeline.json"}),
    "pp2-interleaved-recompute": (
        2,
        {"layout": {"pp": 2, "schedule": "interleaved", "chunks": 2}, "deepspeed": "pipeline.json"}
        | {"recompute": "full"},
    ),
    "pp2-gpipe": (2, {"layout": {"pp": 2, "schedule": "gpipe"}, "deepspeed": "pipeline.json"}),
}


def with_stand_in(task: Any, *args: Any) -> Any:
    """On a rank: the task, with kernels and a library that stand for Transformer Engine."""
    library, kernels = stand_in()
    with ExitStack() as stack:
        stack.enter_context(patch.object(building, "choose_kernels", lambda wanted, device, dtype: kernels))
        stack.enter_context(patch.object(choice, "transformer_engine_obstacle", lambda device: None))
        stack.enter_context(patch.object(choice, "open_library", lambda: library))
        return task(*args)


def record_stand_in(raw: dict[str, Any], steps: int) -> Trace | None:
    return with_stand_in(record_fp64, raw, steps)


def train_stand_in(raw: dict[str, Any], stop_after: int | None = None) -> Any:
    return with_stand_in(test_resume.train, raw, stop_after)


@pytest.fixture(scope="module")
def reference(ranks: RankPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    out = tmp_path_factory.mktemp("te")
    return ranks.run(record_stand_in, 1, tiny(corpus, out, **EXACT, fp8=FP8, kernels="auto"), STEPS)[0]


@pytest.mark.ranks
@pytest.mark.parametrize("name", cells(LAYOUTS, thorough=("zero2-recompute", "pp2-gpipe")))
def test_the_layout_computes_what_one_process_does(
    ranks: RankPool, corpus: str, reference: Trace, out: Path, name: str
) -> None:
    world, changes = LAYOUTS[name]
    raw = tiny(corpus, out, **EXACT, **changes, fp8=FP8, kernels="auto")
    assert_same(ranks.run(record_stand_in, world, raw, STEPS)[0], reference, TOLERANCE)


@pytest.mark.ranks
def test_tensor_ranks_agree_on_scales(ranks: RankPool, corpus: str, reference: Trace, out: Path) -> None:
    layout = {"tp": 2, "sequence_parallel": True}
    raw = tiny(corpus, out, **EXACT, layout=layout, fp8=FP8, kernels="auto")
    assert_same(ranks.run(record_stand_in, 2, raw, STEPS)[0], reference, TOLERANCE)


@pytest.mark.ranks
def test_it_is_not_what_the_wide_format_computes(
    ranks: RankPool, corpus: str, reference: Trace, out: Path
) -> None:
    wide = ranks.run(record_fp64, 1, tiny(corpus, out, **EXACT), STEPS)[0]
    assert apart(wide.gradients, reference.gradients) > 1e-2


@pytest.mark.ranks
@pytest.mark.parametrize("changes", [{"deepspeed": "zero1.json"}], ids=str)
def test_resuming_is_running_through(
    ranks: RankPool, corpus: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Scales of past steps travel in the checkpoint."""

    def raw(folder: str) -> dict[str, Any]:
        more = {"train__steps": 6, "schedule__total_steps": 8}  # which a stop supposes
        return tiny(corpus, tmp_path / folder, **changes, **more, fp8=FP8, kernels="auto")

    whole = ranks.run(train_stand_in, 2, raw("whole"))[0]
    first = ranks.run(train_stand_in, 2, raw("parts"), 3)[0]
    second = ranks.run(train_stand_in, 2, raw("parts"))[0]
    assert first[0] + second[0] == whole[0]
    assert first[1] + second[1] == whole[1]


@pytest.mark.ranks
@rare("to another recipe")
@pytest.mark.parametrize("way", ["from bf16", "to bf16", "to another recipe", "to our own products"])
def test_a_run_may_change_its_format_when_it_resumes(
    ranks: RankPool, corpus: str, tmp_path: Path, way: str
) -> None:
    """No file asks for scales that are not there, and none that is there stands in the way."""
    with_fp8, without = {"fp8": FP8, "kernels": "auto"}, {}
    other = {"fp8": {"recipe": "current", "backend": "auto"}, "kernels": "auto"}
    ours = {"fp8": {"recipe": "delayed", "backend": "torch"}}
    before, after = {
        "from bf16": (without, with_fp8),
        "to bf16": (with_fp8, without),
        "to another recipe": (with_fp8, other),
        "to our own products": (with_fp8, ours),
    }[way]
    for stop, changes in ((3, before), (None, after)):
        task = train_stand_in if changes.get("kernels") == "auto" else test_resume.train
        losses, _, _ = ranks.run(task, 1, tiny(corpus, tmp_path, train__steps=6, **changes), stop)[0]
        assert len(losses) == 3
