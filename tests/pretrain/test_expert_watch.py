"""What is told of experts: the same numbers in every layout, pictures of them, and a word when one starves."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from pretrain.errors import RunError
from pretrain.loop import begin_step
from pretrain.monitor.experts import ExpertWatch
from pretrain.monitor.heat_map import LoadMap, heat_map
from pretrain.monitor.metrics import Record
from pretrain.monitor.sinks import ConsoleSink, DeepSpeedMonitors, ExpertLoadLines
from pretrain.plot import main
from pretrain.run import make_watch
from tests.opened import opened
from tests.ranks import RankPool
from tests.runs import tiny

STEPS = 2
LOSSES = {"aux_loss": 0.1, "sequence_aux_loss": 0.1, "z_loss": 0.1}
MODEL = {"preset": "tiny-moe", "num_layers": 4, "vocab_size": 257, "init_std": 0.1}

LAYOUTS: dict[str, dict[str, Any]] = {
    "EP x DP": {"layout__ep": 2, "deepspeed": "zero1.json"},
    "EP x TP": {
        "layout": {"tp": 2, "sequence_parallel": True, "ep": 2, "etp": 1},
        "deepspeed": "zero1.json",
    },
    "EP x PP": {"layout": {"pp": 2, "ep": 2, "chunks": 2, "schedule": "zb-v"}, "deepspeed": "zero1.json"},
}


def look_rank(raw: dict[str, Any]) -> tuple[dict[str, float], LoadMap | None]:
    with opened(raw) as here:
        watch = make_watch(here.run, here.engine, first_step=0)
        assert watch is not None
        for step in range(STEPS):
            begin_step(here.run, here.engine, step)
            here.engine.train_step(here.feed.next_step())
        seen = watch.look(STEPS)
        again = watch.look(STEPS)
        assert not again.values and again.map is None, "a look takes what it saw"
        return seen.values, seen.map


def raw_run(corpus: str, out: Path, **changes: Any) -> dict[str, Any]:
    raw = tiny(corpus, out, model=MODEL | {"mtp": {"depth": 1}}, **changes)
    raw["model"]["moe"] = LOSSES  # joins the preset's
    return raw


@pytest.fixture(scope="module")
def alone(ranks: RankPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("alone")
    return ranks.run(look_rank, 1, raw_run(corpus, out, deepspeed="zero0.json"))[0]


def test_loads_and_losses_are_told(alone: Any) -> None:
    values, loads = alone
    assert loads.layers == ("layers.0", "layers.1", "layers.2", "layers.3", "mtp.0")
    for row in loads.loads:
        assert sum(row) / len(row) == pytest.approx(1.0)
    first = loads.loads[0]
    assert values["moe/layers.0/load_max"] == max(first) and values["moe/layers.0/load_min"] == min(first)
    assert values["moe/load_max"] == max(max(row) for row in loads.loads)
    assert values["moe/dropped"] == 0.0 and 0 < values["moe/entropy"] <= 1
    for loss in LOSSES:
        layers = [values[f"moe/{name}/{loss}"] for name in loads.layers]
        assert values[f"moe/{loss}"] == pytest.approx(sum(layers) / len(layers)) and min(layers) > 0
    assert 4 < values["mtp_loss"] < 8


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_tells_the_same(
    alone: Any, ranks: RankPool, corpus: str, out: Path, layout: dict[str, Any]
) -> None:
    wanted, wanted_loads = alone
    results = ranks.run(look_rank, 4, raw_run(corpus, out, **layout))
    assert [bool(values) for values, _ in results] == [True, False, False, False], "rank 0 tells"
    values, loads = results[0]
    assert values == pytest.approx(wanted, rel=1e-4)
    assert loads.layers == wanted_loads.layers
    for found, row in zip(loads.loads, wanted_loads.loads, strict=True):
        assert found == pytest.approx(row, rel=1e-6)


def test_what_is_dropped_is_told(ranks: RankPool, corpus: str, out: Path) -> None:
    raw = raw_run(corpus, out, deepspeed="zero1.json", layout__ep=2)
    raw["model"]["moe"] = {"capacity_factor": 0.5}
    values, loads = ranks.run(look_rank, 2, raw)[0]
    assert loads is not None
    kept = [sum(row) / len(row) for row in loads.loads]
    assert values["moe/dropped"] == pytest.approx(1 - sum(kept) / len(kept)) and values["moe/dropped"] >= 0.5


def starve(watch: ExpertWatch, step: int, load: float) -> None:
    watch._warn(LoadMap(("layers.3",), ((load, 2.0 - load),)), step)


def test_a_starving_expert_is_told_of_once_until_it_has_eaten(caplog: pytest.LogCaptureFixture) -> None:
    watch = ExpertWatch(
        SimpleNamespace(), num_experts=2, top_k=1, starving_below=0.1, starving_steps=20, last_step=0
    )
    caplog.set_level(logging.WARNING)
    for step, load in ((10, 0.05), (20, 0.05)):
        starve(watch, step, load)
    assert not caplog.records, "not long enough"
    starve(watch, 30, 0.0)
    starve(watch, 40, 0.0)
    assert [record.getMessage() for record in caplog.records] == [
        "layers.3: expert 0 has had less than 10% of its fair share of tokens since step 10; raise "
        "model.moe.aux_loss (or another balance), or use bias_update_rate with sigmoid scores"
    ]
    starve(watch, 50, 0.5)
    for step in (60, 70, 80):
        starve(watch, step, 0.05)
    assert len(caplog.records) == 2 and "since step 60" in caplog.text


def test_the_map_has_a_row_for_each_layer_and_a_column_for_each_expert() -> None:
    loads = LoadMap(("layers.1", "layers.3"), ((0.5, 1.5, 1.0), (1.0, 1.0, 1.0)))
    axes = heat_map(loads, step=7).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["layers.1", "layers.3"]
    assert axes.get_images()[0].get_array().tolist() == [[0.5, 1.5, 1.0], [1.0, 1.0, 1.0]]
    assert [text.get_text() for text in axes.texts[:3]] == ["0.50", "1.50", "1.00"]
    many = heat_map(LoadMap(("layers.0",), (tuple([1.0] * 256),)), step=7)
    assert not many.axes[0].texts, "no room for numbers"


def record(step: int) -> Record:
    loads = LoadMap(("layers.0",), ((0.5, 1.5),)) if step % 2 == 0 else None
    values = {
        "loss": 5.0,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens": float(step),
        "tokens_per_s": 1.0,
        "step_s": 1.0,
        "tflops_per_s_per_device": 1.0,
    }
    return Record(step, values | {"moe/load_min": 0.5, "moe/load_max": 1.5}, expert_loads=loads)


def test_maps_reach_a_file_that_can_be_drawn(tmp_path: Path, capsys: Any) -> None:
    for resumed_step, last in ((0, 6), (3, 5)):
        sink = ExpertLoadLines(tmp_path / "expert_loads.jsonl", resumed_step=resumed_step)
        for step in range(resumed_step + 1, last + 1):
            sink.write(record(step))
        sink.close()
    lines = [json.loads(line) for line in (tmp_path / "expert_loads.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and lines[0]["loads"] == [[0.5, 1.5]]
    main(["experts", str(tmp_path), "--step", "3"])
    image = tmp_path / "experts.png"
    assert capsys.readouterr().out.strip() == str(image)
    assert image.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RunError, match=r"--step=1: the first map is of step 2"):
        main(["experts", str(tmp_path), "--step", "1"])
    with pytest.raises(RunError, match=r"no expert_loads\.jsonl there; only runs of models with experts"):
        main(["experts", str(tmp_path / "elsewhere")])


def test_tensorboard_has_the_scalars_and_the_map(tmp_path: Path) -> None:
    writer = SummaryWriter(log_dir=str(tmp_path))
    monitor = SimpleNamespace(
        tb_monitor=SimpleNamespace(summary_writer=writer),
        write_events=lambda events: [writer.add_scalar(*event) for event in events],
    )
    sink = DeepSpeedMonitors(monitor, resumed_step=0, texts={})
    for step in (1, 2):
        sink.write(record(step))
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"moe/load_min", "moe/load_max"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("moe/loads")] == [2]


def test_the_console_tells_the_extremes() -> None:
    import io

    from rich.console import Console

    text = io.StringIO()
    sink = ConsoleSink(Console(file=text, width=200), num_steps=2, first_step=0)
    sink.write(record(2))
    sink.close()
    assert "experts 0.50..1.50" in text.getvalue()
