"""Every key of run file and JSON has its rule for a resume; what differs is told or refused before any rank starts."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from data_tools.training_data import check_data
from pretrain.checkpoint.fit import check_before_start, check_fits, told_at_resume
from pretrain.checkpoint.resume_rules import DEEPSPEED, RUN_FILE, Rule, changes, rule_of
from pretrain.checkpoint.state import read_state
from pretrain.config import RunConfig
from pretrain.config_io import make_run
from pretrain.ds_schema import ACCEPTED, SUBSECTIONS
from pretrain.errors import RunError
from tests.pretrain.fake_checkpoints import write_checkpoint
from tests.runs import make_corpus, tiny

# Sections that one rule stands for: whatever is new in them is judged like the rest.
BY_SECTION = ("model.", "data.objective.", "data.train.", "data.validation.", "data.test.")


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from sections(argument)


def run_file_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = list(sections(field.annotation))
        if not inner:
            yield prefix + name
        for section in inner:
            yield from run_file_keys(section, f"{prefix}{name}.")


def json_keys() -> Iterator[str]:
    for key, known in ACCEPTED.items():
        for name in known or ():
            path = f"{key}.{name}"
            yield from (
                (f"{path}.{inner}" for inner in SUBSECTIONS.get(path, ())) if path in SUBSECTIONS else [path]
            )
        if known is None:
            yield key


def test_every_key_of_the_run_file_has_a_rule_of_its_own() -> None:
    keys = {key for key in run_file_keys() if not key.startswith(BY_SECTION)}
    assert keys <= RUN_FILE.keys(), (
        f"say in resume_rules.py what a resume makes of {sorted(keys - RUN_FILE.keys())}"
    )
    known = {*run_file_keys(), "model", "data.train", "data.validation", "data.test", "data.objective", "fp8"}
    gone = {key for key in RUN_FILE if key not in known and not key.startswith("optimizer.params.")}
    assert not gone, "rules of keys that are not there"


def test_every_key_of_the_json_has_a_rule() -> None:
    ruled_together = {"aio", "pipeline", "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger"}
    ruled_together |= {"flops_profiler", "timers", "checkpoint", "scheduler", "data_types", "bfloat16"}
    ruled_together |= {"zero_optimization.offload_optimizer", "zero_optimization.offload_param"}
    for key in json_keys():
        has_one = key in DEEPSPEED or key.rpartition(".")[0] in ruled_together
        assert has_one, f"say in resume_rules.py what a resume makes of {key}"
        assert rule_of(DEEPSPEED, key) is not None


REFUSED_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"model__num_layers": 3}, "holds another model: model.num_layers=3 (checkpoint: 4)"),
    ({"model__norm_eps": 1e-6}, "model.norm_eps=1e-06 (checkpoint: 1e-05)"),
    ({"precision": "bf16"}, "precision.dtype=bf16 (checkpoint: fp32)"),
    ({"optimizer__decay_embeddings": False}, "optimizer.decay_embeddings=False (checkpoint: True)"),
    ({"optimizer__weight_decay": 0.0}, "optimizer.weight_decay=0.0 (checkpoint: 0.1)"),
    ({"optimizer__type": "Lion", "optimizer__lr": 1e-4}, "optimizer.type=Lion (checkpoint: AdamW)"),
    ({"optimizer__params": {"amsgrad": True}}, "optimizer.params.amsgrad=True (checkpoint: nothing)"),
    ({"train__seed": 5}, "train.seed=5 (checkpoint: 1234)"),
    ({"layout__tp": 2}, "was written with tp=1 pp=1 dp=2"),
    (
        {"deepspeed": "zero2.json"},
        "zero_stage=1, this run has tp=1 pp=1 dp=2 sequence_parallel=0 zero_stage=2",
    ),
    ({"data__seed": 9}, "data: data.seed=9 (checkpoint: 1234)"),
    ({"data__split": "80,20,0"}, "data: data.split=80,20,0 (checkpoint: 90,10,0)"),
    ({"data__sequence_length": 16}, "data.sequence_length=16 (checkpoint: 32)"),
]


@pytest.mark.parametrize(("other", "what"), REFUSED_KEYS, ids=[str([*other]) for other, _ in REFUSED_KEYS])
def test_what_the_checkpoint_does_not_fit_is_refused_before_the_start(
    corpus: str, tmp_path: Path, other: dict[str, Any], what: str
) -> None:
    write_checkpoint(make_run(tiny(corpus, tmp_path), world_size=2), 4)
    run = make_run(tiny(corpus, tmp_path, **other), world_size=2)
    with pytest.raises(RunError) as refusal:
        check_before_start(run, check_data(run.config.data))
    assert what in str(refusal.value) and "\n" not in str(refusal.value)
    assert "checkpoint.weights_from=" in str(refusal.value), "and a way out"


@pytest.mark.parametrize(
    ("before", "now", "key"),
    [
        (
            {},
            {"zero_optimization": {"round_robin_gradients": True}},
            "zero_optimization.round_robin_gradients",
        ),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            {},
            "zero_optimization.round_robin_gradients",
        ),
        ({}, {"zero_optimization": {"sub_group_size": 1000}}, "zero_optimization.sub_group_size"),
        ({}, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer.device"),
        ({}, {"fp16": {"loss_scale_window": 7}}, "fp16.loss_scale_window"),
    ],
)
def test_json_keys_that_move_a_ranks_elements_are_refused(
    corpus: str, tmp_path: Path, before: dict[str, Any], now: dict[str, Any], key: str
) -> None:
    def document(name: str, more: dict[str, Any]) -> str:
        zero = {"stage": 1, **more.get("zero_optimization", {})}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**more, "zero_optimization": zero}))
        return str(path)

    out = tmp_path / "out"
    write_checkpoint(make_run(tiny(corpus, out, deepspeed=document("a", before)), world_size=2), 4)
    run = make_run(tiny(corpus, out, deepspeed=document("b", now)), world_size=2)
    with pytest.raises(RunError, match=key):
        check_before_start(run, check_data(run.config.data))


def test_everything_that_is_free_is_told_with_both_values(corpus: str, tmp_path: Path) -> None:
    before = make_run(tiny(corpus, tmp_path), world_size=2)
    folder = write_checkpoint(before, 4)
    changed = tiny(
        corpus,
        tmp_path,
        batch__global_size=16,
        optimizer__lr=2e-3,
        optimizer__gradient_clipping=0.25,
        train__steps=30,
        model__hidden_dropout=0.1,
        monitor__log_every=2,
        kernels="auto",
    )
    run = make_run(changed, world_size=2)
    check_before_start(run, check_data(run.config.data))
    settings, position, rate = told_at_resume(read_state(folder), run)
    for told in (
        "batch.global_size=16 (checkpoint: 8)",
        "optimizer.lr=0.002 (checkpoint: 0.001)",
        "optimizer.gradient_clipping=0.25 (checkpoint: 0.5)",
        "train.steps=30 (checkpoint: 20)",
        "model.hidden_dropout=0.1 (checkpoint: 0.0)",
    ):
        assert told in settings
    assert "log_every" not in settings and "kernels" not in settings
    assert "sample 32" in position
    assert rate.startswith("learning rate of step 5: 0.00") and "schedule.total_steps=20 keeps" in rate


def test_nothing_is_told_where_nothing_changed(corpus: str, tmp_path: Path) -> None:
    run = make_run(tiny(corpus, tmp_path), world_size=2)
    folder = write_checkpoint(run, 4)
    again = make_run(tiny(corpus, tmp_path, name="tiny"), world_size=2)
    assert told_at_resume(read_state(folder), again) == []
    check_fits(read_state(folder), again, folder)


def test_a_cosine_that_has_ended_does_not_rise_in_silence(corpus: str, tmp_path: Path) -> None:
    folder = write_checkpoint(make_run(tiny(corpus, tmp_path, train__steps=6), world_size=1), 6)
    longer = make_run(tiny(corpus, tmp_path, train__steps=12), world_size=1)
    (rate,) = [line for line in told_at_resume(read_state(folder), longer) if "learning rate" in line]
    assert "schedule.total_steps=6 keeps the decay as it was" in rate and "0.0001 by the checkpoint's" in rate
    kept = make_run(tiny(corpus, tmp_path, train__steps=12, schedule__total_steps=6), world_size=1)
    assert not any("learning rate" in line for line in told_at_resume(read_state(folder), kept))


def test_another_tokenizer_is_refused(corpus: str, tmp_path: Path) -> None:
    """The same tokens by another tokenizer's name: nothing else shows that they mean something else."""
    write_checkpoint(make_run(tiny(corpus, tmp_path), world_size=1), 4)
    run = make_run(tiny(corpus, tmp_path), world_size=1)
    data = check_data(run.config.data)
    object.__setattr__(data.tokenizer, "fingerprint", "another")
    with pytest.raises(RunError, match="the tokenizer is another than that of checkpoint"):
        check_before_start(run, data)


def test_a_corpus_that_was_prepared_again_is_refused(corpus: str, tmp_path: Path) -> None:
    prefix = make_corpus(tmp_path, seed=1)
    write_checkpoint(make_run(tiny(prefix, tmp_path), world_size=1), 4)
    for path in tmp_path.glob("corpus.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    make_corpus(tmp_path, seed=2)
    run = make_run(tiny(prefix, tmp_path), world_size=1)
    with pytest.raises(RunError, match="was prepared again or exchanged"):
        check_before_start(run, check_data(run.config.data))


SOURCE_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model__num_layers": 3}, "model.num_layers=3 (checkpoint: 4)"),
    ({"model__activation": "geglu"}, "model.activation=geglu (checkpoint: swiglu)"),
    ({"model__norm_eps": 1e-6}, "model.norm_eps=1e-06 (checkpoint: 1e-05)"),
    ({"model__rotary_base": 5e5}, "model.rotary_base=500000.0 (checkpoint: 10000.0)"),
    ({"model__sliding_window": 8}, "model.sliding_window=8 (checkpoint: nothing)"),
    ({"model__hidden_size": 64}, "model.hidden_size=64"),
    ({"model__ffn_hidden_size": 96}, "model.ffn_hidden_size=96"),
]


@pytest.mark.parametrize(
    ("other", "what"), SOURCE_CHANGES, ids=[str([*other]) for other, _ in SOURCE_CHANGES]
)
def test_weights_that_meant_something_else_are_refused(
    corpus: str, tmp_path: Path, other: dict[str, Any], what: str
) -> None:
    folder = write_checkpoint(make_run(tiny(corpus, tmp_path), world_size=1), 4)
    begun = {"name": "new", "checkpoint__weights_from": str(folder), **other}
    run = make_run(tiny(corpus, tmp_path, **begun), world_size=1)
    with pytest.raises(RunError) as refusal:
        check_before_start(run, check_data(run.config.data))
    assert what in str(refusal.value)
    (key,) = (key.replace("__", ".") for key in other)
    allowed = make_run(tiny(corpus, tmp_path, **begun, checkpoint__allow_changed=[key]), world_size=1)
    if key not in ("model.hidden_size",):  # others follow from it
        check_before_start(allowed, check_data(allowed.config.data))


def test_a_change_that_is_allowed_and_is_none_is_refused(corpus: str, tmp_path: Path) -> None:
    folder = write_checkpoint(make_run(tiny(corpus, tmp_path), world_size=1), 4)
    begun = {"name": "new", "checkpoint__weights_from": str(folder)}
    run = make_run(
        tiny(corpus, tmp_path, **begun, checkpoint__allow_changed=["model.rotary_base"]), world_size=1
    )
    with pytest.raises(RunError, match="the checkpoint has the same value; leave it out"):
        check_before_start(run, check_data(run.config.data))
    with pytest.raises(RunError, match="against what"):
        make_run(tiny(corpus, tmp_path, checkpoint__allow_changed=["model.rotary_base"]), world_size=1)


def test_widths_that_are_stated_or_follow_are_one_model(corpus: str, tmp_path: Path) -> None:
    run = make_run(tiny(corpus, tmp_path), world_size=1)
    folder = write_checkpoint(run, 4)
    model = run.config.model
    stated = make_run(
        tiny(
            corpus,
            tmp_path,
            model__num_kv_heads=model.kv_heads,
            model__head_dim=model.head_width,
            model__ffn_hidden_size=model.ffn_width,
        ),
        world_size=1,
    )
    check_fits(read_state(folder), stated, folder)


def test_a_value_that_became_a_section_is_told_once() -> None:
    found = changes(RUN_FILE, {"fp8": None}, {"fp8": {"recipe": "current"}})
    assert [(change.key, change.rule) for change in found] == [("fp8.recipe", Rule.CONVERTED)]


def test_the_documents_table_is_this_one() -> None:
    lines = Path("docs/resume.md").read_text("utf-8").splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| **")]
    found = {
        (row[1].split("**")[1], key)
        for row in rows
        for key in row[2].replace("`", "").replace(",", " ").split()
    }
    assert found == {(rule.value, key) for table in (RUN_FILE, DEEPSPEED) for key, rule in table.items()}
