"""What a pipeline does besides computing: it resumes, tells of failures with their place, and of waiting too long."""

import io
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.config_io import make_run
from pretrain.engine.auto_schedule import LayerTimes, candidates
from pretrain.engine.groups import join
from pretrain.engine.schedules.catalogue import SCHEDULES
from pretrain.engine.waiting import WaitWatch
from pretrain.errors import RunError
from pretrain.parity import Tensors
from pretrain.run import make_plan, settle_schedule
from tests.conftest import OneProcess
from tests.opened import opened
from tests.parity.agreement import assert_same
from tests.parity.record import record_raw
from tests.pretrain.test_resume import eight, refused, train
from tests.ranks import RankError, RankPool
from tests.runs import tiny
from tests.thorough import rare

V = {"pp": 2, "chunks": 2, "schedule": "zb-v"}
INTERLEAVED = {"pp": 2, "chunks": 2, "schedule": "interleaved"}


@pytest.mark.ranks
@rare("interleaved")
@pytest.mark.parametrize("layout", [V, INTERLEAVED], ids=["zb-v", "interleaved"])
def test_resuming_equals_running_through_bit_for_bit(
    ranks: RankPool, corpus: str, tmp_path: Path, layout: dict[str, Any]
) -> None:
    changes = {"layout": layout, "deepspeed": "pipeline.json", "precision": "bf16"}
    through = ranks.run(train, 2, eight(corpus, tmp_path / "through", **changes))[0]
    raw = eight(corpus, tmp_path / "stopped", **changes)
    first, second = ranks.run(train, 2, raw, 5)[0], ranks.run(train, 2, raw)[0]
    assert first[0] + second[0] == through[0]
    assert same(second[2], through[2])


def same(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def stopped(ranks: RankPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An interleaved run that was stopped after 4 of 8 steps."""
    raw = eight(corpus, tmp_path_factory.mktemp("stopped"), layout=INTERLEAVED, deepspeed="pipeline.json")
    ranks.run(train, 2, raw, 4)
    return raw


@pytest.mark.ranks
@pytest.mark.parametrize(
    "layout",
    [
        {"pp": 2},
        V,
        {**INTERLEAVED, "partition": [0, 1, 3, 5, 7]},
        {"pp": 4},
    ],
    ids=["1f1b", "zb-v", "partition", "pp4"],
)
def test_optimizer_states_of_another_placement_are_refused_naming_both(
    ranks: RankPool, stopped: dict[str, Any], layout: dict[str, Any]
) -> None:
    message = ranks.run(refused, layout["pp"], {**stopped, "layout": layout})[0]
    assert "pp=2" in message and "chunks=2 placement=loop stages=[0," in message
    assert "checkpoint.weights_from=" in message


@pytest.mark.ranks
def test_weights_of_one_schedule_start_a_run_of_any_other(
    ranks: RankPool, corpus: str, stopped: dict[str, Any], tmp_path: Path
) -> None:
    source = str(Path(stopped["out"]) / "tiny")
    no_dropout = {"model__hidden_dropout": 0.0, "model__attention_dropout": 0.0}
    raw = eight(corpus, tmp_path, checkpoint={"weights_from": source}, train__steps=1, **no_dropout)
    losses = [
        ranks.run(train, size, {**raw, "layout": layout, "name": name})[0][0]
        for name, size, layout in (("one", 1, {}), ("v", 2, V), ("four", 4, {"pp": 4, "schedule": "zb-h1"}))
    ]
    assert losses[0][0] < 5.4, "not the initial weights"
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def break_in_a_forward_pass(raw: dict[str, Any]) -> None:
    with opened(raw) as here:
        if dist.get_rank() == 1:
            calls = []

            def spoil(module: Any, inputs: Any) -> None:
                calls.append(1)
                if len(calls) == 3:
                    raise ValueError("this layer breaks")

            here.engine.layers[0].module.register_forward_pre_hook(spoil)
        here.engine.train_step(here.feed.next_step())


@pytest.mark.ranks
def test_a_stage_that_raises_names_its_place_and_the_others_end(
    ranks: RankPool, corpus: str, out: Path
) -> None:
    with pytest.raises(RankError, match="this layer breaks") as failed:
        ranks.run(break_in_a_forward_pass, 2, tiny(corpus, out, layout={"pp": 2}, deepspeed="pipeline.json"))
    place = "rank 1, stage 1, step 1, in the forward pass of micro-batch 2, chunk 0"
    assert str(failed.value).startswith("rank 1 of 2 failed first") and place in str(failed.value)


def wait_for_a_late_stage(raw: dict[str, Any]) -> str:
    with redirect_stderr(io.StringIO()) as told, opened(raw) as here:
        if dist.get_rank() == 0:
            time.sleep(3)
        here.engine.train_step(here.feed.next_step())
    return told.getvalue()


@pytest.mark.ranks
def test_a_rank_that_waits_too_long_says_for_what(ranks: RankPool, corpus: str, out: Path) -> None:
    raw = tiny(corpus, out, layout={"pp": 2}, deepspeed="pipeline.json", monitor={"hang_s": 1.0})
    told = ranks.run(wait_for_a_late_stage, 2, raw)[1]
    line = "rank 1, stage 1: has waited 1 s for activation of micro-batch 0 from stage 0, step 1\n"
    assert told.count(line) == 1


def test_waiting_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = WaitWatch("rank 7", 0.2)
    told = ""
    with watch.waiting_for("a message"):
        while not told:
            told = capsys.readouterr().err
            time.sleep(0.05)
        time.sleep(0.6)
    sys.stderr.flush()
    assert told + capsys.readouterr().err == "rank 7: has waited 0.2 s for a message\n"


def test_where_no_limit_is_set_nobody_watches() -> None:
    watch = WaitWatch("rank 7", 0.0)
    with watch.waiting_for("a message"):
        assert watch._thread is None


@pytest.mark.ranks
def test_auto_chooses_by_what_was_measured_and_all_ranks_agree(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path
) -> None:
    raw = tiny(
        corpus,
        out,
        layout={"pp": 2, "schedule": "auto"},
        deepspeed="pipeline.json",
        batch={"global_size": 16, "micro_size": 1},
        model__num_layers=6,
    )
    chosen = ranks.run(choose, 2, raw)
    assert chosen[0] == chosen[1] and chosen[0][0] in SCHEDULES
    trace = ranks.run(record_raw, 2, raw, 5)[0]
    changes = {"batch": {"global_size": 16, "micro_size": 1}, "model__num_layers": 6}
    assert_same(trace, one_process(5, **changes))


def choose(raw: dict[str, Any]) -> tuple[str, int]:
    run = make_run(raw, world_size=dist.get_world_size())
    groups = join(run.layout)
    settled, groups = settle_schedule(run, make_plan(run, groups), groups)
    assert groups.layout == settled.layout and settled.layout.chunks == settled.config.layout.chunks
    return settled.config.layout.schedule, settled.layout.chunks


@pytest.mark.parametrize(
    ("weights", "transfer_s", "wanted"),
    [(1.0, 0.0, "zb-h1"), (0.0, 0.0, "interleaved"), (0.0, 3.0, "eager")],
    ids=["split", "one half", "slow links"],
)
def test_the_choice_follows_the_times(
    corpus: str, out: Path, weights: float, transfer_s: float, wanted: str
) -> None:
    """Weight gradients that take time fill bubbles (ZB-H1 is within 1% of the best and holds the least); where they
    take none, chunks shrink them; where links are slow, more micro-batches in flight hide those.
    """
    raw = tiny(
        corpus,
        out,
        layout={"pp": 2, "schedule": "auto"},
        deepspeed="pipeline.json",
        batch={"global_size": 8, "micro_size": 1},
        model__num_layers=9,
    )
    run = make_run(raw, world_size=2)
    layers = [LayerTimes(1.0, 2.0 - weights, weights)] * 12
    found = candidates(run, layers, transfer_s, on_nccl=False)
    assert found[0].schedule == wanted, [candidate.title for candidate in found]
    kept = candidates(run, layers, transfer_s, on_nccl=False, only={"chunks": 1, "placement": "loop"})
    assert kept[0].chunks == 1


def test_auto_chooses_its_chunks_itself(corpus: str, out: Path) -> None:
    with pytest.raises(RunError, match=r"layout\.chunks=2 with layout\.schedule=auto: chunks are chosen"):
        make_run(tiny(corpus, out, layout={"pp": 2, "chunks": 2, "schedule": "auto"}), world_size=2)
