"""Secrets of a run's documents reach what they are for, and nothing that is written."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from launch.keeper import Keeper
from model_providers.layout import Layout
from pretrain import show_config
from pretrain.config import RunConfig
from pretrain.config_io import find_deepspeed_json
from pretrain.engine.groups import join
from pretrain.monitor.trackers import engine_document, open_trackers, tracker_faults
from pretrain.redaction import REDACTED, is_secret, is_secret_variable, redacted, redacted_args, secret_keys
from pretrain.run_file import to_yaml
from tests.opened import opened
from tests.ranks import RankPool
from tests.runs import checked, tiny

KEY = "SECRETKEY123"


def json_with_key(folder: Path, *, enabled: bool = False) -> str:
    document = json.loads(find_deepspeed_json("zero1.json").read_text("utf-8"))
    path = folder / "own.json"
    path.write_text(json.dumps({**document, "comet": {"enabled": enabled, "api_key": KEY}}), "utf-8")
    return str(path)


@pytest.mark.parametrize(
    "name", ["api_key", "comet.api_key", "apiKey", "hub_token", "db_password", "client_secret", "credentials"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name) and is_secret_variable(name)


@pytest.mark.parametrize(
    "name", ["chunk_tokens", "token_types", "tokenizer", "experiment_key", "train.steps", "lr"]
)
def test_names_that_are_none(name: str) -> None:
    assert not is_secret(name)


def test_variables_that_hold_secrets() -> None:
    names = [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "SIGNING_KEY",
        "PGPASSWORD",
        "MY_CREDENTIALS_JSON",
    ]
    assert all(map(is_secret_variable, names))
    assert not any(map(is_secret_variable, ["NCCL_DEBUG", "TOKENIZERS_PARALLELISM", "PYTHONPATH", "HF_HOME"]))


def test_a_redacted_copy_has_the_rest_as_it_was() -> None:
    document = {
        "comet": {"api_key": KEY, "project": "p"},
        "token": None,
        "credentials": [{"user": "u"}],
        "lr": 1.0,
    }
    assert redacted(document) == {
        "comet": {"api_key": REDACTED, "project": "p"},
        "token": None,
        "credentials": [{"user": REDACTED}],
        "lr": 1.0,
    }
    assert document["comet"] == {"api_key": KEY, "project": "p"}
    assert secret_keys({"comet": {"api_key": KEY}, "token": None}) == ["comet.api_key"]
    assert redacted_args(["run.yaml", f"a.password={KEY}", "train.steps=1"])[1:] == [
        "a.password=***",
        "train.steps=1",
    ]


def test_no_key_of_the_run_file_is_taken_for_a_secret() -> None:
    """Else its value would be lost in the run folder's copy."""

    def names(schema: Any) -> set[str]:
        if isinstance(schema, list):
            return set().union(*map(names, schema))
        if not isinstance(schema, dict):
            return set()
        return set(schema.get("properties", {})).union(*map(names, schema.values()))

    assert not [name for name in names(RunConfig.model_json_schema()) if is_secret(name)]


def test_run_files_and_printed_configurations_show_no_secret(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tiny(corpus, tmp_path, deepspeed=json_with_key(tmp_path))
    config = checked(raw, 1).config
    optimizer = config.optimizer.model_copy(update={"params": {"api_key": KEY}})
    assert KEY not in to_yaml(config.model_copy(update={"optimizer": optimizer}))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw), "utf-8")
    show_config.main([str(path), "--json"])
    show_config.main([str(path)])
    shown = capsys.readouterr().out
    assert KEY not in shown and shown.count(REDACTED) == 2


def test_a_ranks_log_shows_no_secret_of_its_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGALOOM_LOGS", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    Keeper("platform", [f"comet.api_key={KEY}"], is_plain=True).wait()
    log = (tmp_path / "rank0.log").read_text("utf-8")
    assert "comet.api_key=***" in log and KEY not in log


def saved(raw: dict[str, Any], folder: str) -> tuple[str, str]:
    """Which of the engine's files hold the key, and the key that the run itself holds."""
    with opened(raw) as here:
        here.engine.save(Path(folder) / "deepspeed", {})
        told = [
            str(path)
            for path in Path(folder).rglob("*")
            if path.is_file() and KEY.encode() in path.read_bytes()
        ]
        assert any(Path(folder).rglob("*.pt"))
        here.engine.load(Path(folder) / "deepspeed")
        return " ".join(told), here.run.deepspeed["comet"]["api_key"]


@pytest.mark.ranks
def test_a_checkpoint_holds_no_secret(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    raw = tiny(corpus, tmp_path / "out", deepspeed=json_with_key(tmp_path))
    assert ranks.run(saved, 1, raw, str(tmp_path / "saved")) == [("", KEY)]


def started_with(document: dict[str, Any]) -> list[Any]:
    """What DeepSpeed's monitor gives Comet's client."""
    join(Layout())
    asked: list[Any] = []
    sys.modules["comet_ml"] = SimpleNamespace(  # type: ignore[assignment]
        __version__="3.50.0", start=lambda **given: asked.append(given["api_key"])
    )
    open_trackers(document, resumed_step=0)
    return asked


@pytest.mark.ranks
def test_comets_client_gets_the_real_key(ranks: RankPool) -> None:
    assert ranks.run(started_with, 1, {"comet": {"enabled": True, "api_key": KEY}}) == [[KEY]]


def test_the_engine_opens_no_tracker_and_gets_no_key() -> None:
    document = {
        "comet": {"enabled": True, "api_key": KEY},
        "tensorboard": {"enabled": True},
        "steps_per_print": 3,
    }
    assert engine_document(document) == {
        "comet": {"enabled": False, "api_key": REDACTED},
        "tensorboard": {"enabled": False},
        "steps_per_print": 3,
    }


def test_a_run_folders_copy_is_no_source_of_a_key(corpus: str, tmp_path: Path) -> None:
    faults = list(tracker_faults({"csv_monitor": {"enabled": True, "password": REDACTED}}))
    assert (
        len(faults) == 1
        and faults[0].startswith("csv_monitor.password=***: ")
        and "CSV_MONITOR_PASSWORD" in faults[0]
    )
    run = checked(tiny(corpus, tmp_path, deepspeed=json_with_key(tmp_path)), 1)
    assert list(tracker_faults(run.deepspeed)) == []


def test_a_tracker_without_its_package_is_refused_with_the_way_to_install_it() -> None:
    """Neither is a dependency of this project."""
    document = {
        "wandb": {"enabled": True, "project": "p"},
        "comet": {"enabled": True},
        "csv_monitor": {"enabled": True},
    }
    faults = list(tracker_faults(document))
    assert len(faults) == 2
    assert faults[0].startswith("wandb.enabled=true: ") and "pip install wandb" in faults[0]
    assert faults[1].startswith("comet.enabled=true: ") and "pip install comet_ml" in faults[1]
