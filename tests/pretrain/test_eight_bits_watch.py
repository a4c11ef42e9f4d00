"""What FP8 loses is told alike in every layout; a guard's decision is every rank's, and a resumed run keeps it."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from model_providers.fp8.config import GuardConfig
from model_providers.fp8.linears import Fp8Linear
from model_providers.fp8.tally import Facts
from pretrain import run as run_module
from pretrain.checkpoint import save_load, store
from pretrain.loop import Loop, NotFinite
from pretrain.monitor import banner
from pretrain.monitor.eight_bits_watch import beyond
from pretrain.run import make_eight_bits_watch
from tests.opened import Opened, opened
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import rare

VICTIM = "layers.2.mlp.linear_fc1"
SPOILT_STEP = 2
DELAYED = {"recipe": "delayed", "watch_every": 1}
TP_SP = {"layout": {"tp": 2, "sequence_parallel": True}}
PP = {"layout": {"pp": 2}, "deepspeed": "pipeline.json"}
ZB_V = {"layout": {"pp": 2, "schedule": "zb-v", "chunks": 2}, "deepspeed": "pipeline.json"}
ZERO_3 = {"deepspeed": "zero3.json", "recompute": "full"}


class Lines(logging.Handler):
    """What the guard says, on this rank."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Memory:
    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def write(self, record: Any) -> None:
        self.values.append(record.values)

    def close(self) -> None: ...


def victims(here: Opened) -> list[Fp8Linear]:
    """On the ranks that hold it."""
    parts = here.engine.module.modules()
    return [part for part in parts if isinstance(part, Fp8Linear) and part.scaling.name == VICTIM]


def grow(here: Opened, now: dict[str, int]) -> None:
    """The linear's input is a hundred times what it was a step ago, its output as before."""
    for part in victims(here):
        part.register_forward_pre_hook(lambda _, args: (args[0] * 100.0 ** now["step"], *args[1:]))
        part.register_forward_hook(lambda _, __, output: (output[0] / 100.0 ** now["step"], output[1]))


def spoil(here: Opened, now: dict[str, int], *, always: bool = False) -> None:
    """One step's input of a linear is not finite, but only where it runs in eight bits."""

    def look(part: Any, args: Any) -> Any:
        is_now = now["step"] == SPOILT_STEP and part.training and (always or part.scaling.is_on)
        return (args[0] * math.nan, *args[1:]) if is_now else None

    for part in victims(here):
        part.register_forward_pre_hook(look)


def go(raw: dict[str, Any], what: str = "", steps: int | None = None) -> dict[str, Any]:
    """Train from the newest checkpoint on; what each rank saw and decided."""
    now = {"step": 0}

    class Telling(Loop):
        def _one_step(self, step: int, *rest: Any) -> Any:
            now["step"] = step
            if what == "without" and step == SPOILT_STEP:
                self.engine.deepspeed.eight_bits.bar(self.eight_bits.names)  # type: ignore[union-attr]
            return super()._one_step(step, *rest)

    with opened(raw) as here:
        if here.groups.is_first:
            here.data.tokenizer.save(here.run.folder / store.TOKENIZER)
        dist.barrier()
        found = save_load.find(here.run, here.groups)
        first = save_load.load(found, here.engine).step if found else 0
        here.feed.close()
        feed = type(here.feed)(
            here.data.train, here.run, here.groups, consumed_samples=first * here.run.global_size
        )
        {"grow": grow, "nan": spoil}.get(what, lambda *_: None)(here, now)
        if what == "nan everywhere":
            spoil(here, now, always=True)
        watch, memory = make_eight_bits_watch(here.run, here.engine), Memory()
        assert watch is not None
        at_start = list(watch.barred)
        loop = Telling(
            run=here.run,
            engine=here.engine,
            feed=feed,
            evaluate=dict,
            test=dict,
            save=lambda step: run_module.save(here.run, here.engine, here.data, step, feed),
            sinks=[memory],
            eight_bits=watch,
        )
        if steps is not None:
            object.__setattr__(here.run.config.train, "steps", steps)
        lines, log = Lines(), logging.getLogger("pretrain.monitor.eight_bits_watch")
        log.addHandler(lines)
        try:
            loop.train(first)
        finally:
            log.removeHandler(lines)
            feed.close()
        line = dict(banner.facts(here.run, here.engine, resumed=None, barred=at_start))["fp8"]
        return {
            "values": memory.values,
            "barred": watch.barred,
            "at_start": at_start,
            "banner": line,
            "lines": lines.said,
        }


def raw_run(corpus: str, out: Path, steps: int, fp8: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return tiny(corpus, out, fp8=fp8, train__steps=steps, schedule__total_steps=8, **changes)


def losses(result: dict[str, Any]) -> list[float]:
    return [values["loss"] for values in result["values"]]


@pytest.fixture(scope="module")
def alone(ranks: RankPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("alone")
    fp8 = {**DELAYED, "shadow_every": 2}
    return ranks.run(go, 1, raw_run(corpus, out, 2, fp8, deepspeed="zero0.json"))[0]


@pytest.mark.ranks
def test_every_linear_in_fp8_is_told_of(alone: dict[str, Any]) -> None:
    first, second = alone["values"]
    linears = [
        f"layers.{i}.{part}" for i in (1, 2) for part in ("self_attention.linear_qkv", "mlp.linear_fc2")
    ]
    for linear in linears:
        for operand in ("input", "weight", "gradient"):
            facts = {key: second[f"fp8/{linear}/{operand}/{key}"] for key in Facts._fields}
            assert facts["amax"] > 0 and 0 < facts["error"] < 0.1 and facts["underflow"] < 0.1
            assert math.log2(facts["scale"]).is_integer()
            assert facts["overflow"] < 0.01
    assert not any(key.startswith(("fp8/layers.0", "fp8/layers.3", "fp8/head")) for key in second)
    for key in ("overflow", "underflow", "error"):
        shares = [
            value
            for name, value in second.items()
            if name.startswith("fp8/layers") and f"input/{key}" in name
        ]
        assert min(shares) <= second[f"fp8/input/{key}"] <= max(shares)
    assert "fp8/gap" in second and "fp8/gap" not in first and 0 < second["fp8/gap"] < 0.01
    assert second["fp8/barred"] == 0


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("changes", "dp"),
    [
        pytest.param(TP_SP, 1, id="tp2+sp"),
        pytest.param(ZB_V, 1, id="zb-v"),
        pytest.param(ZERO_3, 2, id="zero3-recompute"),
    ],
)
def test_every_layout_tells_the_same(
    alone: dict[str, Any], ranks: RankPool, corpus: str, out: Path, changes: dict[str, Any], dp: int
) -> None:
    results = ranks.run(go, 2, raw_run(corpus, out, 2, {**DELAYED, "shadow_every": 2}, **changes))
    for found, wanted in zip(results[0]["values"], alone["values"], strict=True):
        told = {key: value for key, value in wanted.items() if key.startswith("fp8/")}
        assert {key for key in found if key.startswith("fp8/")} == set(told)
        for key, value in told.items():
            # A rank's gradients are those of its own samples' mean, before the average over the copies of the model.
            factor = dp if "gradient" in key and key.endswith(("amax", "scale")) else 1
            # Sums in another order round numbers to the other side now and then: the largest may be such a one.
            near = 0.1 if key.endswith(("amax", "error")) else 2e-3
            if key == "fp8/gap":  # of each copy's own first samples
                assert 0 < found[key] < 0.01
            else:
                assert found[key] == pytest.approx(value * factor, rel=near, abs=3e-4), key


@pytest.mark.ranks
@rare("zero3-recompute")
@pytest.mark.parametrize("changes", [TP_SP, PP, ZERO_3], ids=["tp2+sp", "pp2", "zero3-recompute"])
def test_a_linear_that_overflows_goes_back_on_every_rank_and_stays_when_the_run_resumes(
    ranks: RankPool, corpus: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    fp8 = {**DELAYED, "guard": {"strikes": 2}}
    through = ranks.run(go, 2, raw_run(corpus, tmp_path / "through", 5, fp8, **changes), "grow")
    assert [result["barred"] for result in through] == [[VICTIM]] * 2
    told = [values["fp8/barred"] for values in through[0]["values"]]
    assert told == [0, 0, 1, 1, 1], "steps 2 and 3 overflow: the first has no past"
    assert f"fp8/{VICTIM}/input/amax" not in through[0]["values"][3]
    (line,) = through[0]["lines"]
    assert line.startswith(f"step 3: {VICTIM} goes back to fp32 for good: ") and through[1]["lines"] == []
    assert line.endswith("% of its input are clipped (fp8.guard.overflow=0.01), on 2 watched steps in a row")
    stopped = raw_run(corpus, tmp_path / "stopped", 5, fp8, **changes)
    first = ranks.run(go, 2, stopped, "grow", 2)[0]  # between the first strike and the second
    second = ranks.run(go, 2, stopped, "grow", 4)[0]
    third = ranks.run(go, 2, stopped, "grow")[0]
    assert losses(first) + losses(second) + losses(third) == losses(through[0]), "bit for bit"
    assert second["at_start"] == [] and third["at_start"] == [VICTIM]
    assert third["banner"].startswith("delayed by torch")
    assert third["banner"].endswith(f"; back in fp32 for good: {VICTIM}")


@pytest.mark.ranks
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"deepspeed": "zero1.json"}, id="zero1"),
        pytest.param({**PP, "precision": "bf16"}, id="pp2-bf16"),
        pytest.param(
            {"layout": {"tp": 2}, "deepspeed": "zero0.json"}, id="tp2-zero0", marks=pytest.mark.thorough
        ),
        pytest.param({**ZERO_3, "precision": "bf16"}, id="zero3-bf16", marks=pytest.mark.thorough),
    ],
)
def test_a_nan_that_only_fp8_makes_takes_the_run_back_and_costs_no_step(
    ranks: RankPool, corpus: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    fp8 = {"recipe": "current", "watch_every": 3}
    more = {"model__hidden_dropout": 0.1, **changes}
    results = ranks.run(go, 2, raw_run(corpus, tmp_path / "nan", 5, fp8, **more), "nan")
    wanted = ranks.run(go, 2, raw_run(corpus, tmp_path / "without", 5, fp8, **more), "without")[0]
    assert losses(results[0]) == losses(wanted), "as if the run had left FP8 before that step"
    assert all(math.isfinite(loss) for loss in losses(wanted))
    assert results[0]["barred"] == results[1]["barred"] and len(results[0]["barred"]) == 8
    assert [values["fp8/barred"] for values in results[0]["values"]] == [0, 0, 8, 8, 8]
    (line,) = results[0]["lines"]
    told = r"step 3: loss nan, gradient norm (nan|inf) with FP8, and finite numbers without it: the run goes"
    assert re.match(told, line)
    again = ranks.run(go, 2, raw_run(corpus, tmp_path / "nan", 6, fp8, **more))[0]
    assert len(again["at_start"]) == 8 and "and 4 more" in again["banner"]


def stopped_by(raw: dict[str, Any], what: str) -> str:
    try:
        go(raw, what)
    except NotFinite as stop:
        return str(stop)
    return "went on"


@pytest.mark.ranks
def test_what_is_not_finite_without_fp8_either_stops_the_run(ranks: RankPool, corpus: str, out: Path) -> None:
    fp8 = {"recipe": "current"}
    everywhere = ranks.run(stopped_by, 2, raw_run(corpus, out, 4, fp8), "nan everywhere")
    assert all("step 3: loss nan" in message and "layers.2" in message for message in everywhere)
    raw = raw_run(corpus, out / "unguarded", 4, {**fp8, "guard": None})
    assert "step 3: loss nan" in ranks.run(stopped_by, 2, raw, "nan")[0]


@pytest.mark.ranks
@rare("zero3-recompute")
@pytest.mark.parametrize("changes", [ZB_V, ZERO_3], ids=["zb-v", "zero3-recompute"])
def test_a_gap_takes_the_run_back_and_a_look_changes_nothing(
    ranks: RankPool, corpus: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    fp8 = {"recipe": "current", "watch_every": 2, "shadow_every": 2}
    more = {"model__hidden_dropout": 0.1, **changes}
    looked = ranks.run(go, 2, raw_run(corpus, tmp_path / "looked", 4, fp8, **more))[0]
    blind = {"recipe": "current", "watch_every": 0, "guard": None}
    plain = ranks.run(go, 2, raw_run(corpus, tmp_path / "plain", 4, blind, **more))[0]
    assert losses(looked) == losses(plain)
    strict = raw_run(corpus, tmp_path / "strict", 4, {**fp8, "guard": {"gap": 1e-12}}, **more)
    results = ranks.run(go, 2, strict)
    assert [values["fp8/barred"] for values in results[0]["values"]] == [0, 8, 8, 8]
    assert results[0]["barred"] == results[1]["barred"] and "fp8/gap" not in results[0]["values"][3]
    assert "by more than fp8.guard.gap=1e-12: the run goes back to fp32 for good" in results[0]["lines"][0]
    assert losses(results[0])[:2] == losses(plain)[:2] and losses(results[0])[3] != losses(plain)[3]


def test_the_line_tells_the_operand_and_the_limit() -> None:
    fine = Facts(amax=1.0, scale=1.0, overflow=0.0, underflow=0.1, error=0.02)
    guard = GuardConfig()
    assert beyond({"input": fine}, guard) is None
    assert beyond({"input": fine, "gradient": fine._replace(underflow=0.75)}, guard) == (
        "75.00% of its gradient become zero (fp8.guard.underflow=0.5)"
    )
    assert beyond({"input": fine._replace(overflow=0.02)}, guard) == (
        "2.00% of its input are clipped (fp8.guard.overflow=0.01)"
    )
