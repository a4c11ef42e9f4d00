"""`megaloom config` says of every value where it comes from."""

from pathlib import Path

import pytest
import yaml

from pretrain.config_io import Run, load_run
from pretrain.show_config import json_table, main, value_table
from tests.runs import tiny


@pytest.fixture
def run_file(corpus: str, out: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny(corpus, out, precision="bf16")), "utf-8")
    return path


def rows(table) -> dict[str, tuple[str, str]]:  # type: ignore[no-untyped-def]
    keys, values, origins = (list(column.cells) for column in table.columns)
    return dict(zip(keys, zip(values, origins, strict=True), strict=True))


def test_values_of_the_run(run_file: Path) -> None:
    run: Run = load_run(run_file, ["schedule=linear", "optimizer.lr=2e-3"], world_size=2)
    shown = rows(value_table(run))
    assert shown["optimizer.lr"] == ("0.002", "command line")
    assert shown["schedule.kind"] == ('"linear"', "command line")
    assert shown["precision.dtype"] == ('"bf16"', "mine.yaml")
    assert shown["precision.accumulate"] == ('"fp32"', "default")
    assert shown["model.hidden_size"][1] == "preset tiny" and shown["model.num_layers"][1] == "mine.yaml"


def test_values_of_the_deepspeed_json(run_file: Path) -> None:
    shown = rows(json_table(load_run(run_file, world_size=2)))
    assert shown["zero_optimization.stage"] == ("1", "zero1.json")
    assert shown["optimizer.params.lr"] == ("0.001", "optimizer.lr (mine.yaml)")
    assert shown["bf16.enabled"] == ("true", "precision.dtype (mine.yaml)")
    assert shown["communication_data_type"] == ('"fp32"', "precision.accumulate (default)")
    assert shown["optimizer.params.fused"] == ("true", "Megaloom")


def test_it_prints_both_or_the_json_alone(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run_file), "--ranks", "2"])
    told = capsys.readouterr().out
    assert "world size 2" in told and "as it is after zero1.json is filled" in told
    main([str(run_file), "--ranks", "2", "--json"])
    assert yaml.safe_load(capsys.readouterr().out)["train_batch_size"] == 8
