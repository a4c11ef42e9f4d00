"""The report tells of every recipe and every bit, for each family; what it concludes follows from its figures."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_tools.training_data import open_data
from launch.__main__ import main as megaloom
from launch.fp8_report import main
from model_providers.building import solo_groups
from model_providers.families import build_plan
from model_providers.layout import TensorPlace
from pretrain.checkpoint import manifest, store
from pretrain.checkpoint.weights import state_of, write_layer
from pretrain.config_io import Run
from pretrain.engine.layers import tied_names
from pretrain.errors import RunError
from pretrain.fp8_report import ALL_BLOCKS, SWEEP, examine, page
from pretrain.fp8_trials import Blocks, Outcome, Subject, apart
from pretrain.fp8_verdict import Report, choose, is_safe, verdict
from pretrain.generate import load_trained
from pretrain.run_file import to_yaml
from pretrain.scoring import held_out_sets, score
from tests.runs import checked, tiny

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"fp8": {"recipe": "delayed", "bf16_first": 0}, "precision": "bf16"},
    "moe": {
        "model": {"preset": "tiny-moe", "num_layers": 3, "vocab_size": 257},
        "fp8": {"recipe": "current", "experts": False},
    },
    "fp8-moe": {"model": {"preset": "tiny-moe", "num_layers": 3, "vocab_size": 257}},
    "bert": {
        "model": {"preset": "tiny-bert", "vocab_size": None},
        "data__objective": {"kind": "mlm", "second_task": "sentence_order"},
    },
    "electra": {
        "model": {"preset": "tiny-electra", "vocab_size": None},
        "data__objective": {"kind": "mlm", "replaced": True},
    },
    "t5": {
        "model": {"preset": "tiny-t5", "vocab_size": None},
        "data__objective": {"kind": "span_corruption"},
    },
}


@pytest.fixture(scope="module")
def runs(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each family, with a checkpoint of its initial weights."""
    out = tmp_path_factory.mktemp("runs")
    for family, changes in FAMILIES.items():
        write_initial(checked(tiny(corpus, out, name=family, **changes), 1))
    return {family: out / family for family in FAMILIES}


def write_initial(run: Run) -> None:
    """What a run would save before its first step, but for optimizer states."""
    config, folder = run.config, store.partial_folder(run.folder / "checkpoints", 0)
    plan = build_plan(
        config.model,
        run.layout,
        solo_groups(),
        seed=1,
        sequence_length=config.data.sequence_length,
        kernels="torch",
    )
    (folder / store.WEIGHTS).mkdir()
    tied = tied_names(plan)
    for layer in plan.layers:
        state = {k: v for k, v in state_of(layer.build()).items() if f"{layer.name}.{k}" not in tied}
        write_layer(folder / store.WEIGHTS, layer.name, state, TensorPlace(), dense=True, experts=True)
    (folder / store.CONFIG).write_text(to_yaml(config), "utf-8")
    open_data(config.data).tokenizer.save(folder / store.TOKENIZER)
    store.complete(folder, [manifest.record(folder, path) for path in manifest.files_of(folder)])


def test_a_report_tells_all_in_words_numbers_and_a_picture(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "sweep.svg"
    main([str(runs["gpt"]), "--samples", "4", "--json", "--out", str(picture)])
    told = json.loads(capsys.readouterr().out)
    assert "<svg" in picture.read_text("utf-8")
    assert told["format"] == "bf16" and told["blocks"] == {"first": 0, "last": 1}
    assert told["linears"] == {"fp8": 12, "all": 16}
    assert list(told["recipes"]) == ["delayed", "current", "blockwise", "mxfp8", "nvfp4"]
    own = told["own"]["gradient_error"]
    assert 0 < own < 0.05 and told["own"]["gap"] == 0.0 and told["fp32"]["gradient_error"] is None
    for recipe, outcome in told["recipes"].items():
        assert own < outcome["gradient_error"] < (1.0 if recipe == "nvfp4" else 0.3)
        assert 0 < outcome["gap"] < 0.05 and outcome["sharpness"] > 0
    by_bits = {(row["exponent"], row["mantissa"]): row for row in told["sweep"]}
    assert list(by_bits) == SWEEP
    errors = [by_bits[8, mantissa]["gradient_error"] for mantissa in (7, 5, 3, 1)]
    assert errors == sorted(errors) and errors[-1] > 3 * errors[0]
    assert errors[0] == pytest.approx(own, rel=0.1), "bf16's operands have seven bits"
    worst = [max(row["overflow"], row["underflow"], row["error"]) for row in told["worst"]]
    assert len(worst) == 10 and worst == sorted(worst, reverse=True)
    assert {(row["first"], row["last"]) for row in told["placements"]} >= {(0, 0), (1, 1), (0, 2)}
    assert len(told["verdict"]) >= 4


@pytest.mark.parametrize("family", ["moe", "fp8-moe", "bert", "electra", "t5"])
def test_every_family_has_a_report(runs: dict[str, Path], family: str) -> None:
    found = examine(runs[family], ["current"], num_samples=2)
    text = "\n".join(page(found))
    assert found.wide == "fp32" and found.own.gradient_error == 0.0
    assert 0 < found.recipes["current"].gradient_error < 0.3  # type: ignore[operator]
    assert found.num_narrow > 0 and "current" in text and "E8M3" in text
    assert ("experts stay in the run's own format" in text) == (family == "moe")
    narrow = Subject(load_trained(runs[family], CPU, fp8=ALL_BLOCKS), [], []).narrow(Blocks(0, 0))
    assert any(".experts." in name for name in narrow) == (family == "fp8-moe")
    assert (found.own.sharpness is None) == (family == "electra")
    trained = load_trained(runs[family], CPU)
    if family in ("moe", "fp8-moe", "t5"):  # others have losses beside that of words
        source = next(iter(held_out_sets(trained, None).values()))
        assert found.exact.loss == pytest.approx(
            score(trained, source, num_samples=2, micro_size=2).loss, rel=1e-5
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "checkpoint=nowhere"),
        (["x", "--samples", "0"], "--samples=0: must be 1 or more"),
        (["x", "--recipes", "current,fp4"], "--recipes=fp4: unknown; there are delayed, current"),
        (["x", "--out", "sweep.txt"], r"--out=sweep\.txt: a picture's name ends in \.png"),
    ],
)
def test_a_mistake_is_told_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(RunError, match=message):
        main(words)


def test_the_command_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    megaloom(["--help"])
    assert "fp8-report" in capsys.readouterr().out


def test_a_model_without_such_linears_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain import fp8_report

    trained = SimpleNamespace(layers=[torch.nn.Linear(2, 2)])
    monkeypatch.setattr(fp8_report, "load_trained", lambda *_, **__: trained)
    monkeypatch.setattr(fp8_report, "held_out_sets", lambda *_: {"valid": None})
    monkeypatch.setattr(fp8_report, "numbers", lambda *_: ([0], [0]))
    monkeypatch.setattr(fp8_report, "read", lambda *_: [])
    with pytest.raises(RunError, match="checkpoint=x: this model has no linear layer that runs in FP8"):
        examine(Path("x"), ["current"], num_samples=1)


GOOD, BAD = Outcome(3.0, 0.001, 0.05, 0.999, 1.0), Outcome(3.1, 0.02, 0.5, 0.9, 1.2)


def made(recipes: dict[str, Outcome], placements: dict[Blocks, Outcome], chosen: str) -> Report:
    return Report(
        *("x", "4 of valid", "bf16", Blocks(1, 1), 8, 16, Outcome(3.0), Outcome(3.0, 0.0, 0.0, 1.0)),
        recipes=recipes,
        sweep={(8, 3): GOOD, (8, 2): GOOD, (8, 1): BAD, (4, 1): GOOD},
        chosen=chosen,
        placements=placements,
    )


def test_the_verdict_follows_from_the_figures() -> None:
    recipes = {"delayed": BAD, "current": GOOD, "mxfp8": GOOD}
    assert choose(recipes, None) == "current" and choose(recipes, "mxfp8") == "mxfp8"
    assert choose(recipes, "delayed") == "current" and choose({"delayed": BAD}, "delayed") == "delayed"
    placements = {Blocks(0, 0): BAD, Blocks(0, 1): BAD, Blocks(1, 1): GOOD, Blocks(0, 2): BAD}
    lines = verdict(made(recipes, placements, "current"))
    assert lines[0].startswith("Safe here: current, mxfp8 (loss within 0.25% of bf16's")
    assert "fp8.bf16_first=1 fp8.bf16_last=1 (gradient error 5.00%" in lines[1]
    assert lines[-2] == "Mantissa bits that are enough here, with exponents of 8 bits: 2."
    none = verdict(made({"delayed": BAD}, {Blocks(0, 0): BAD}, "delayed"))
    assert none[0].startswith("No recipe is safe here: the nearest, delayed, moves the loss by 2.00%")
    assert none[0].endswith("stay in bf16.") and "No choice of blocks" in none[1]
    assert not is_safe(Outcome(3.0, float("nan"), 0.1, 0.999)) and not is_safe(
        Outcome(3.0, 0.0, 0.1, float("nan"))
    )


def test_gradients_are_compared_as_one_vector() -> None:
    exact = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    error, cosine = apart([torch.tensor([3.0, 0.0]), torch.tensor([0.0])], exact)
    assert error == pytest.approx(0.8) and cosine == pytest.approx(0.6)
    assert Subject(SimpleNamespace(layers=[]), [], []).linears == []  # type: ignore[arg-type]
