"""The DeepSpeed JSON: "auto" filled, disagreement refused, every typo found, every shipped file in use."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

from model_providers.cost import parameters
from pretrain import ds_schema
from pretrain.ds_config import Buckets, gradient_buckets
from pretrain.ds_offload import AUTO
from pretrain.errors import RunError
from pretrain.nested import leaves
from tests.runs import checked, tiny

SHIPPED = sorted(Path("ds_configs").glob("*.json"))


@pytest.fixture
def with_json(corpus: str, out: Path, tmp_path: Path) -> Any:
    """``with_json({...}, world_size=1, **changes)``: a run with that DeepSpeed JSON."""

    def make(document: dict[str, Any] | str, world_size: int = 1, **changes: Any) -> Any:
        path = tmp_path / "deepspeed.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return checked(tiny(corpus, out, **changes, deepspeed=str(path)), world_size)

    return make


def test_what_only_the_json_states_moves_into_the_run(with_json: Any) -> None:
    document = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.25,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "amsgrad": False, "betas": [0.8, 0.9]}},
        "zero_optimization": {"stage": 1},
    }
    run = with_json(document, batch={"global_size": 8}, optimizer={})
    assert run.micro_size == 4 and run.num_micro_batches == 2
    assert run.config.optimizer.gradient_clipping == 0.25
    assert run.config.precision.dtype == "bf16"
    assert run.config.optimizer.lr == 2e-4 and run.config.optimizer.betas == (0.8, 0.9)
    assert run.config.optimizer.params == {"amsgrad": False}
    assert run.origins["optimizer.lr"] == "deepspeed.json"
    assert run.deepspeed["optimizer"]["params"]["amsgrad"] is False


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            r"train_micro_batch_size_per_gpu in deepspeed\.json is 4, but batch\.micro_size",
        ),
        (
            {"gradient_clipping": 1.0},
            r"gradient_clipping in deepspeed\.json is 1\.0, but optimizer\.gradient_clipping",
        ),
        (
            {"optimizer": {"params": {"lr": 1e-2}}},
            r"optimizer\.params\.lr in deepspeed\.json is 0\.01, but optimizer\.lr",
        ),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, r"scheduler in deepspeed\.json and schedule in"),
        (
            {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
            r"bf16\.enabled and fp16\.enabled are both true",
        ),
        (
            {"tensorboard": {"enabled": True}},
            r"tensorboard\.enabled in deepspeed\.json is true, but monitor\.tensorboard",
        ),
    ],
)
def test_two_statements_that_disagree_are_refused_naming_both(
    with_json: Any, document: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        with_json(document)


def test_two_statements_that_agree_are_fine(with_json: Any) -> None:
    run = with_json(
        {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"params": {"lr": "1e-3"}},
            "gradient_clipping": 0.5,
        }
    )
    assert run.micro_size == 2


def test_a_dtype_switched_off_in_one_place_and_on_in_the_other_is_refused(with_json: Any) -> None:
    with pytest.raises(RunError, match=r"bf16\.enabled in deepspeed\.json is false, but precision\.dtype"):
        with_json({"bf16": {"enabled": False}, "zero_optimization": {"stage": 1}}, precision="bf16")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"gradient_clipp1ng": 1.0},
            r"gradient_clipp1ng: DeepSpeed knows no such key; did you mean 'gradient_clipping'\?",
        ),
        ({"totally_unknown_section": {}}, r"totally_unknown_section: DeepSpeed knows no such key"),
        ({"zero_optimization": {"stag": 1}}, r"zero_optimization\.stag: .*did you mean 'stage'\?"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            r"zero_optimization\.offload_optimizer\.devise: .*did you mean 'device'\?",
        ),
        ({"fp16": {"enable": True}}, r"fp16\.enable: .*did you mean 'enabled'\?"),
        (
            {"activation_checkpointing": {}},
            r"activation_checkpointing: not used with Megaloom: .*recompute\.mode",
        ),
        ({"elasticity": {}}, r"elasticity: DeepSpeed has removed this feature"),
        ({"zero_optimization": 1}, r"zero_optimization=1: must be a section"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
            r"zero_optimization\.offload_param\.device=disk: choose none, cpu or nvme",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": "half"}}},
            r"zero_optimization\.offload_optimizer\.ratio=half: must be a share between 0 and 1",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": -1}}},
            r"ratio=-1: must be a share between 0 and 1",
        ),
        ('{"bf16": {}, "bf16": {}}', r"the key 'bf16' stands twice"),
        ('{"bf16": {},}', r"not valid JSON"),
        ("[]", r"must hold one JSON object"),
    ],
)
def test_a_key_that_deepspeed_would_ignore_is_an_error(with_json: Any, document: Any, message: str) -> None:
    with pytest.raises(RunError, match=message):
        with_json(document)


def test_defaults_that_surprise_are_written_out(with_json: Any) -> None:
    """No clipping key means 1.0 to DeepSpeed, and bf16 accumulates in bf16 unless told."""
    run = with_json(
        {"zero_optimization": {"stage": 1}}, precision="bf16", optimizer={"gradient_clipping": 0.0}
    )
    assert run.deepspeed["gradient_clipping"] == 0.0
    assert run.deepspeed["data_types"]["grad_accum_dtype"] == "fp32"
    assert run.deepspeed["communication_data_type"] == "fp32"
    assert run.deepspeed["bf16"]["check_grad_overflow"] is True
    assert run.deepspeed["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}


def test_an_auto_that_means_nothing_is_refused(with_json: Any) -> None:
    with pytest.raises(
        RunError, match=r"zero_optimization\.parameter_alignment: nothing in the run file says what"
    ):
        with_json({"zero_optimization": {"stage": 3, "parameter_alignment": "auto"}})


def test_the_jsons_own_scheduler_may_rule(with_json: Any) -> None:
    document = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}
    run = with_json(document, schedule=None)
    assert run.config.schedule is None and run.deepspeed["scheduler"] == document["scheduler"]


def test_adafactors_own_eps_may_stand_in_the_json(with_json: Any) -> None:
    document = {"optimizer": {"type": "Adafactor", "params": {"lr": 1e-2, "eps": [None, 1e-3]}}}
    run = with_json({**document, "zero_optimization": {"stage": 1}}, optimizer={"lr": 1e-2})
    assert run.deepspeed["optimizer"]["params"]["eps"] == [None, 1e-3]


@pytest.mark.parametrize("kind", ["RAdam", "NAdam", "Adamax"])
def test_betas_reach_every_optimizer_that_has_them(with_json: Any, kind: str) -> None:
    stated = {"type": kind, "betas": [0.5, 0.6], "eps": 1e-5}
    run = with_json({"zero_optimization": {"stage": 0}}, optimizer=stated)
    params = run.deepspeed["optimizer"]["params"]
    assert (params["betas"], params["eps"]) == ([0.5, 0.6], 1e-5)


def test_whatever_goes_to_nvme_goes_there_wholly(with_json: Any, tmp_path: Path) -> None:
    """DeepSpeed would keep 1e9 parameters in memory, and layers in swap buffers."""
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    document = {"stage": 3, "reduce_bucket_size": "auto", "sub_group_size": "auto"}
    offload = {"offload_param": nvme, "offload_optimizer": {**nvme, "pipeline_read": True}}
    run = with_json({"zero_optimization": {**document, **offload}})
    zero = run.deepspeed["zero_optimization"]
    assert zero["offload_param"]["max_in_cpu"] == zero["stage3_max_reuse_distance"] == 0
    assert zero["offload_optimizer"]["buffer_count"] == 8
    assert zero["sub_group_size"] == run.largest_shard // 8
    assert zero["reduce_bucket_size"] <= run.largest_shard * run.layout.dp + 1
    kept = {"offload_param": {**nvme, "max_in_cpu": 5}}
    zero = with_json({"zero_optimization": {**document, **kept}}).deepspeed["zero_optimization"]
    assert zero["offload_param"]["max_in_cpu"] == 5 and zero["sub_group_size"] == 1_000_000_000


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_json_fills_completely(corpus: str, out: Path, tmp_path: Path, path: Path) -> None:
    run = checked(tiny(corpus, out, deepspeed=path.name, nvme_path=str(tmp_path)), 2)
    assert AUTO not in [value for _, value in leaves(dict(run.deepspeed))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_json_trains_in_some_test(path: Path) -> None:
    """The parity suite runs each of them on real ranks, and the README of the folder has a line for each."""
    suite = "".join(file.read_text() for file in Path("tests/parity").glob("*.py"))
    by_stage = re.fullmatch(r"zero[0-3]\.json", path.name)
    assert path.name in suite or (by_stage and 'f"zero{self.zero}.json"' in suite)
    assert f"`{path.name}`" in Path("ds_configs/README.md").read_text()


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("zero_optimization", DeepSpeedZeroConfig),
        ("fp16", DeepSpeedFP16Config),
        ("bf16", DeepSpeedBF16Config),
        ("tensorboard", TensorBoardConfig),
        ("wandb", WandbConfig),
        ("csv_monitor", CSVConfig),
        ("comet", CometConfig),
        ("comms_logger", CommsLoggerConfig),
        ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("zero_optimization.offload_param", DeepSpeedZeroOffloadParamConfig),
    ],
)
def test_the_tables_of_keys_are_deepspeeds_own(section: str, model: Any) -> None:
    deprecated = {"cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "legacy_stage1"}
    deprecated |= {"stage3_gather_fp16_weights_on_model_save"}
    theirs = {
        name for field, info in model.model_fields.items() for name in (field, info.alias) if name
    } - deprecated
    ours = ds_schema.SUBSECTIONS.get(section) or ds_schema.ACCEPTED[section]
    assert ours == theirs


class Recorder(dict):  # type: ignore[type-arg]
    """A dict that remembers which keys it was asked for."""

    asked: set[str] = set()  # noqa: RUF012

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __copy__(self) -> "Recorder":
        return self


def test_every_top_level_key_that_deepspeed_asks_for_is_known() -> None:
    document = Recorder(train_batch_size=1, train_micro_batch_size_per_gpu=1)
    deepspeed_config.DeepSpeedConfig(document)
    known = {*ds_schema.ACCEPTED, *ds_schema.REFUSED, *ds_schema.REMOVED}
    assert document.asked - known == set()
    assert set(ds_schema.REMOVED) == set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)


def test_an_odd_number_of_parameters_is_no_fault(corpus: str, out: Path) -> None:
    """DeepSpeed's ZeRO asserts that its buckets have an even size."""
    raw = tiny(corpus, out, **ODD)
    run = checked(raw, 1)
    assert parameters(run.config.model) % 2
    zero = run.deepspeed["zero_optimization"]
    assert zero["allgather_bucket_size"] % 2 == zero["reduce_bucket_size"] % 2 == 0


ODD = {
    "model__hidden_size": 33,
    "model__num_attention_heads": 3,
    "model__head_dim": 11,
    "model__num_kv_heads": 1,
    "model__num_layers": 1,
    "model__ffn_hidden_size": 3,
    "model__qk_norm": False,
    "model__position_embedding": "none",
    "model__pad_vocab_to_multiple_of": 257,
}


@pytest.mark.parametrize(
    ("zero", "buckets"),
    [
        ({"stage": 1, "reduce_bucket_size": 1000}, Buckets(1000, 1)),
        ({"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True}, Buckets(1000, 2)),
        ({"stage": 3, "reduce_bucket_size": 1000}, Buckets(1000, 2)),
        ({"stage": 1}, Buckets(500_000_000, 1)),
        ({"stage": 2, "contiguous_gradients": False}, Buckets(0, 0)),
    ],
)
def test_buckets_of_gradients_are_those_that_deepspeed_makes(
    with_json: Any, zero: dict[str, Any], buckets: Buckets
) -> None:
    assert gradient_buckets(with_json({"zero_optimization": zero}).deepspeed) == buckets
