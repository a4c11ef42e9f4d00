"""Run files: precedence, strictness, plain messages."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config_io import load_run
from pretrain.errors import RunError
from pretrain.run_file import to_yaml
from pretrain.show_config import origin
from tests.runs import checked, tiny


def write(folder: Path, raw: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw), "utf-8")
    return path


def test_words_go_before_the_file_and_the_file_before_the_preset(
    corpus: str, out: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, tiny(corpus, out, model={"preset": "tiny", "vocab_size": 300, "num_layers": 3}))
    run = load_run(path, ["model.num_layers=5", "train.steps=7"], world_size=1)
    model = run.config.model
    assert (model.num_layers, model.vocab_size, model.hidden_size, run.config.train.steps) == (5, 300, 32, 7)
    assert origin(run, "model.num_layers") == "command line"
    assert origin(run, "model.vocab_size") == "run.yaml"
    assert origin(run, "model.hidden_size") == "preset tiny"
    assert origin(run, "train.seed") == "default"


def test_a_part_of_the_preset_may_be_changed_in_part(corpus: str, out: Path, tmp_path: Path) -> None:
    preset = {"preset": "tiny-moe", "vocab_size": 257}
    path = write(tmp_path, tiny(corpus, out, model=preset | {"moe": {"aux_loss": 0.5}}))
    run = load_run(path, ["model.moe.top_k=3"], world_size=1)
    moe = run.config.model.moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.aux_loss) == (4, 3, 0.5)
    assert origin(run, "model.moe.top_k") == "command line"
    assert origin(run, "model.moe.aux_loss") == "run.yaml"
    assert origin(run, "model.moe.num_experts") == "preset tiny-moe"
    assert load_run(path, ["model.moe=null"], world_size=1).config.model.moe is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": {}}, r"trian: no such key; did you mean 'train'\?"),
        ({"optimizer__learning_rate": 1}, r"optimizer\.learning_rate: no such key; there are betas"),
        (
            {"optimizer__weight_decya": 1},
            r"optimizer\.weight_decya: no such key; did you mean 'weight_decay'\?",
        ),
        ({"model__hidden_sise": 1}, r"model\.hidden_sise: no such key; did you mean 'hidden_size'\?"),
        (
            {"schedule": {"kind": "cosine", "warmup": 1}},
            r"schedule\.warmup: no such key; did you mean 'warmup_steps'\?",
        ),
        ({"schedule": {"kind": "cosin"}}, r"schedule: kind must be one of constant, cosine, linear, wsd"),
        ({"data": 5}, r"data=5: must be a section of keys and values"),
        ({"batch": None}, r"batch=null: must be a section of keys and values"),
        ({"name": "a/b"}, r"name='a/b': may hold letters, digits"),
        ({"train__steps": "many"}, r"train\.steps='many': input should be a valid integer"),
        ({"train__steps": 0}, r"train\.steps=0: input should be greater than or equal to 1"),
        ({"precision": "fp8"}, r"precision\.dtype='fp8': input should be 'fp32', 'bf16' or 'fp16'"),
        ({"model__num_attention_heads": 5}, r"num_attention_heads=5: does not divide hidden_size=32"),
        ({"model": {"preset": "gtp2-124m"}}, r"model\.preset=gtp2-124m.*gpt2-124m"),
        (
            {"deepspeed": "zero9.json"},
            r"deepspeed=zero9\.json: neither a file here nor in ds_configs, which has .*zero1\.json",
        ),
        ({"deepspeed": "no/such.json"}, r"deepspeed=no/such\.json: no such file"),
        ({"data__train": "no/corpus"}, r"no/corpus"),
        ({"model__vocab_size": 100}, r"model\.vocab_size=100: the tokenizer of .* has 257 ids"),
    ],
)
def test_a_mistake_is_told_in_one_plain_line(
    corpus: str, out: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message) as told:
        checked(tiny(corpus, out, **changes), 1)
    assert "pydantic" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {preset: tiny\n  x: [\n", r"not valid YAML: line 2, column 4: expected ',' or '}'"),
        ("- a\n- b\n", r"must hold keys and values"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", r"the key 'train' stands twice"),
    ],
)
def test_a_broken_run_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(RunError, match=message) as told:
        load_run(path, world_size=1)
    assert "\n" not in str(told.value)


def test_a_missing_run_file_names_those_that_ship() -> None:
    with pytest.raises(RunError, match=r"no/run\.yaml: no such run file; there are .*demo\.yaml"):
        load_run("no/run.yaml", world_size=1)
    with pytest.raises(RunError, match=r"tests: is a folder; give a run file; there are .*demo\.yaml"):
        load_run("tests", world_size=1)


@pytest.mark.parametrize(
    ("word", "message"), [("train.steps", "overrides are written key=value"), ("a={", "not valid YAML")]
)
def test_a_broken_override_is_one_line(
    corpus: str, out: Path, tmp_path: Path, word: str, message: str
) -> None:
    with pytest.raises(RunError, match=message):
        load_run(write(tmp_path, tiny(corpus, out)), [word], world_size=1)


def test_scientific_notation_is_a_number(corpus: str, out: Path, tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as a string; users of other stacks lost days to it."""
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(tiny(corpus, out)).replace("lr: 0.001", "lr: 1e-4\n  params: {amsgrad_eps: 5e-4}")
    )
    run = load_run(path, ["optimizer.weight_decay=1e-2"], world_size=1)
    assert run.config.optimizer.lr == 1e-4
    assert run.config.optimizer.weight_decay == 1e-2
    assert run.config.optimizer.params["amsgrad_eps"] == 5e-4


def test_the_resolved_configuration_reads_back_as_itself(corpus: str, out: Path, tmp_path: Path) -> None:
    run = checked(tiny(corpus, out, precision="bf16", recompute="full"), 1)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(run.config), "utf-8")
    assert load_run(path, world_size=1).config == run.config


def test_the_vocabulary_comes_from_the_corpus(corpus: str, out: Path) -> None:
    raw = tiny(corpus, out)
    raw["model"]["vocab_size"] = None
    run = checked(raw, 1)
    assert run.config.model.vocab_size == 257
    assert origin(run, "model.vocab_size").startswith("tokenizer of")


@pytest.mark.parametrize("section", ["precision", "recompute", "schedule", "model"])
def test_a_section_in_one_word_still_has_parts(corpus: str, out: Path, tmp_path: Path, section: str) -> None:
    short = {"precision": "bf16", "recompute": "full", "schedule": "constant", "model": "tiny"}[section]
    part = {
        "precision": "accumulate=bf16",
        "recompute": "every=2",
        "schedule": "warmup_steps=3",
        "model": "vocab_size=300",
    }[section]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**tiny(corpus, out), section: short}))
    run = load_run(path, [f"{section}.{part}"], world_size=1)
    key, _, value = part.partition("=")
    assert str(getattr(getattr(run.config, section), key)) == value
    again = load_run(path, [f"{section}={short}", f"{section}.{part}"], world_size=1)
    assert again.config == run.config


def test_one_value_of_the_default_schedule_can_be_set_alone(corpus: str, out: Path) -> None:
    schedule = checked(tiny(corpus, out, schedule={"warmup_steps": 5}), 1).config.schedule
    assert schedule is not None and (schedule.kind, schedule.warmup_steps) == ("cosine", 5)


def test_a_models_faults_come_without_the_model(corpus: str, out: Path) -> None:
    with pytest.raises(RunError) as told:
        checked(tiny(corpus, out, model__num_attention_heads=7), 1)
    assert "num_attention_heads=7: does not divide" in str(told.value) and "{" not in str(told.value)


def test_a_single_value_has_no_parts(corpus: str, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny(corpus, out)))
    with pytest.raises(RunError, match=r"train\.steps\.x=1: train\.steps is one value and has no parts"):
        load_run(path, ["train.steps.x=1"], world_size=1)
