"""The one translator of DeepSpeed's JSON: fills its "auto" values from the run file, and refuses disagreement.

A value may stand in the JSON, in the run file, or in neither; if both state it, they must agree, or the run is
refused naming both places.  What comes out is complete: no "auto", and every value whose DeepSpeed default
surprises (clipping 1.0, accumulation and messages in bf16) is written out.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.ds_offload import AUTO, fill_offload, offload_faults, offload_place
from pretrain.ds_schema import key_faults
from pretrain.errors import RunError
from pretrain.nested import get, leaves, put
from pretrain.optimizer_facts import TRIED_HERE, canonical

NEVER = 2**31 - 1  # steps_per_print: Megaloom's own console tells the progress
MAX_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default, deepspeed/runtime/zero/config.py
ADAM_LIKE = {"adam", "adamw"}
TAKES = {
    "adam": {"betas", "eps"},
    "adamw": {"betas", "eps"},
    "lamb": {"betas", "eps"},
    "muon": {"betas", "eps"},
    "lion": {"betas"},
    "adagrad": {"eps"},
    "adamw8bit": {"betas", "eps"},
    "galore": {"betas", "eps"},
    "radam": {"betas", "eps"},
    "nadam": {"betas", "eps"},
    "adamax": {"betas", "eps"},
    "rmsprop": {"eps"},
    "adadelta": {"eps"},
}


@dataclass(frozen=True)
class Pair:
    """A fact that has a name in both files."""

    json_key: str
    run_key: str


PAIRS = (
    Pair("train_batch_size", "batch.global_size"),
    Pair("train_micro_batch_size_per_gpu", "batch.micro_size"),
    Pair("gradient_accumulation_steps", "batch.accumulation_steps"),
    Pair("gradient_clipping", "optimizer.gradient_clipping"),
    Pair("optimizer.type", "optimizer.type"),
    Pair("optimizer.params.lr", "optimizer.lr"),
    Pair("optimizer.params.betas", "optimizer.betas"),
    Pair("optimizer.params.eps", "optimizer.eps"),
    Pair("optimizer.params.weight_decay", "optimizer.weight_decay"),
    Pair("data_types.grad_accum_dtype", "precision.accumulate"),
    Pair("tensorboard.enabled", "monitor.tensorboard"),
)


@dataclass
class Reading:
    """A JSON and a raw run file, brought together: values from the JSON moved into the run, and the faults met."""

    document: dict[str, Any]
    run: dict[str, Any]
    taken: set[str] = field(default_factory=set)  # run keys whose value came from the JSON
    faults: list[str] = field(default_factory=list)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk; a repeated key or a syntax error is one line with its place."""
    try:
        document = json.loads(path.read_text("utf-8"), object_pairs_hook=_no_repeats)
    except FileNotFoundError:
        raise RunError(f"deepspeed={path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise RunError(f"deepspeed={path}: not valid JSON: {fault}") from None
    except _RepeatedKey as fault:
        raise RunError(f"deepspeed={path}: the key {fault} stands twice") from None
    if not isinstance(document, dict):
        raise RunError(f"deepspeed={path}: must hold one JSON object")
    return document


def bring_together(
    document: dict[str, Any], run: dict[str, Any], *, json_name: str, run_name: str
) -> Reading:
    """Check the JSON's keys and move what only it states into the run (both as plain nested dicts)."""
    reading = Reading(copy.deepcopy(document), copy.deepcopy(run))
    reading.faults += [f"{json_name}: {fault}" for fault in key_faults(document)]
    stage = get(document, "zero_optimization.stage")
    if stage not in (None, 0, 1, 2, 3):
        reading.faults.append(f"{json_name}: zero_optimization.stage={_show(stage)}: must be 0, 1, 2 or 3")
    reading.faults += [f"{json_name}: {fault}" for fault in offload_faults(document)]
    if reading.faults:
        return reading
    for pair in PAIRS:
        stated = get(reading.document, pair.json_key)
        # Adafactor has two of eps, which have no name of their own in the run file.
        if pair.run_key == "optimizer.eps" and isinstance(stated, list):
            _take(reading, pair.json_key, stated, where=f"{pair.json_key} in {json_name}", run_name=run_name)
        elif stated is not None and stated != AUTO:
            _take(reading, pair.run_key, stated, where=f"{pair.json_key} in {json_name}", run_name=run_name)
    _read_dtype(reading, json_name=json_name, run_name=run_name)
    _read_optimizer_params(reading, json_name=json_name, run_name=run_name)
    _read_scheduler(reading, json_name=json_name, run_name=run_name)
    return reading


def complete(document: dict[str, Any], facts: "Facts") -> dict[str, Any]:
    """The JSON with every "auto" and every gap filled from the run's facts."""
    full = copy.deepcopy(document)
    full.pop("bfloat16", None)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        full[key] = getattr(facts, key)
    full["gradient_clipping"] = facts.gradient_clipping
    full.setdefault("steps_per_print", NEVER)
    full["optimizer"] = _optimizer_section(full.get("optimizer") or {}, facts)
    full["bf16"] = {**_section(full, "bf16"), "enabled": facts.dtype == "bf16"}
    full["fp16"] = {**_section(full, "fp16"), "enabled": facts.dtype == "fp16"}
    if facts.dtype == "bf16":
        full["bf16"].setdefault("check_grad_overflow", True)
    accumulate = facts.accumulate if facts.dtype != "fp32" else "fp32"
    full["data_types"] = {**_section(full, "data_types"), "grad_accum_dtype": accumulate}
    # A sum over ranks is part of the sum; DeepSpeed would send bf16 and round it once more.
    full["communication_data_type"] = _filled(full, "communication_data_type", accumulate)
    full["tensorboard"] = {
        "enabled": facts.tensorboard,
        "output_path": _filled(full, "tensorboard.output_path", facts.folder),
        "job_name": _filled(full, "tensorboard.job_name", "tensorboard"),
    }
    if full.get(
        "csv_monitor"
    ):  # DeepSpeed would write below the working folder, every run into the same files
        full["csv_monitor"] = {
            **full["csv_monitor"],
            "output_path": _filled(full, "csv_monitor.output_path", facts.folder),
            "job_name": _filled(full, "csv_monitor.job_name", "csv"),
        }
    _fill_zero(full, facts)
    if full["zero_optimization"]["stage"] and full["optimizer"]["type"].lower() in TRIED_HERE:
        full.setdefault("zero_allow_untested_optimizer", True)
    _fill_kernels(full, facts)
    full["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False, **_section(full, "pipeline")}
    if full.get("scheduler") in (AUTO, None):
        full.pop("scheduler", None)
    leftover = sorted(key for key, value in leaves(full) if value == AUTO)
    if leftover:
        way_out = "write the value"
        if all(key.endswith("nvme_path") for key in leftover):
            way_out = "set nvme_path=/a/folder/on/a/local/disk"
        raise RunError(
            f'{", ".join(leftover)}: nothing in the run file says what "auto" means here; {way_out}'
        )
    return full


@dataclass(frozen=True)
class Facts:
    """What the run knows and DeepSpeed asks for."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    gradient_clipping: float
    optimizer: dict[str, Any]  # type, lr, betas, eps, weight_decay, params
    dtype: str
    accumulate: str
    tensorboard: bool
    folder: str
    nvme_path: str | None
    hidden_size: int
    parameters_per_rank: int
    largest_shard: int  # elements of the largest parameter on one rank under ZeRO-3

    @property
    def copies(self) -> int:
        """Data-parallel ranks."""
        return self.train_batch_size // (
            self.train_micro_batch_size_per_gpu * self.gradient_accumulation_steps
        )


def _take(reading: Reading, run_key: str, value: Any, *, where: str, run_name: str) -> None:
    ours = get(reading.run, run_key)
    if ours is None:
        put(reading.run, run_key, value)
        reading.taken.add(run_key)
    elif not _same(ours, value):
        reading.faults.append(
            f"{where} is {_show(value)}, but {run_key} in {run_name} is {_show(ours)}: "
            f'keep one of them (write "auto" in the JSON, or leave the key out of the run file)'
        )


def _same(ours: Any, theirs: Any) -> bool:
    try:
        return [float(x) for x in _listed(ours)] == [float(x) for x in _listed(theirs)]
    except (TypeError, ValueError):
        return str(ours).lower() == str(theirs).lower()


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _show(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _read_dtype(reading: Reading, *, json_name: str, run_name: str) -> None:
    stated = {
        name: get(reading.document, f"{section}.enabled")
        for name, section in (("bf16", "bf16"), ("bf16", "bfloat16"), ("fp16", "fp16"))
        if get(reading.document, f"{section}.enabled") not in (None, AUTO)
    }
    switched_on = [name for name, value in stated.items() if value is True]
    if len(switched_on) > 1:
        reading.faults.append(f"{json_name}: bf16.enabled and fp16.enabled are both true: keep one")
    elif switched_on:
        where = f"{switched_on[0]}.enabled in {json_name}"
        _take(reading, "precision.dtype", switched_on[0], where=where, run_name=run_name)
    for name, value in stated.items():
        if value is False and get(reading.run, "precision.dtype") == name:
            reading.faults.append(
                f"{name}.enabled in {json_name} is false, but precision.dtype in {run_name} is {name}"
            )


def _read_optimizer_params(reading: Reading, *, json_name: str, run_name: str) -> None:
    """Parameters without a name of their own in the run file travel in optimizer.params."""
    named = {pair.json_key for pair in PAIRS}
    for key, value in (get(reading.document, "optimizer.params") or {}).items():
        path = f"optimizer.params.{key}"
        if path not in named and value != AUTO:
            _take(reading, path, value, where=f"{path} in {json_name}", run_name=run_name)


def _read_scheduler(reading: Reading, *, json_name: str, run_name: str) -> None:
    theirs = reading.document.get("scheduler")
    if theirs in (None, AUTO):
        if reading.run.get("schedule") is None:
            reading.run["schedule"] = {"kind": "cosine"}
    elif reading.run.get("schedule") is not None:
        reading.faults.append(
            f"scheduler in {json_name} and schedule in {run_name} both rule the learning rate: keep one of "
            "them "
            f'(write "auto" in the JSON, or leave schedule out)'
        )


def _optimizer_section(section: dict[str, Any], facts: Facts) -> dict[str, Any]:
    kind = canonical(facts.optimizer["type"])
    takes = TAKES.get(kind.lower(), set())
    params: dict[str, Any] = {"lr": facts.optimizer["lr"], "weight_decay": facts.optimizer["weight_decay"]}
    params |= {
        key: list(_listed(facts.optimizer[key])) if key == "betas" else facts.optimizer[key] for key in takes
    }
    params |= facts.optimizer["params"]
    return {**section, "type": kind, "params": params}


def _fill_zero(full: dict[str, Any], facts: Facts) -> None:
    zero = full.setdefault("zero_optimization", {"stage": 0})
    zero.setdefault("stage", 0)
    fill_offload(zero, facts)
    elements = facts.parameters_per_rank
    if offload_place(full, "offload_optimizer") == "nvme":  # a bucket of them all would stay in memory
        elements = min(elements, facts.largest_shard * facts.copies)
    bucket = max(2, min(MAX_BUCKET_ELEMENTS, elements + elements % 2))  # DeepSpeed asks for an even number
    hidden = facts.hidden_size
    # The last three are the values that Hugging Face's integration made the meaning of "auto".
    fillers: dict[str, Callable[[], int]] = {
        "reduce_bucket_size": lambda: bucket,
        "allgather_bucket_size": lambda: bucket,
        "stage3_prefetch_bucket_size": lambda: int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": lambda: 10 * hidden,
        "stage3_max_live_parameters": lambda: 1_000_000_000,
    }
    for key, value in fillers.items():
        if zero.get(key) == AUTO:
            zero[key] = value()


def _fill_kernels(full: dict[str, Any], facts: Facts) -> None:
    """torch's fused AdamW runs on CPU and CUDA without compiling anything; DeepSpeed's own is a JIT build."""
    kind, params = facts.optimizer["type"].lower(), full["optimizer"]["params"]
    if kind == "muon" and full["zero_optimization"]["stage"] == 3:
        full["zero_optimization"].setdefault(
            "reduce_scatter", False
        )  # DeepSpeed's Muon wants whole gradients
    if optimizer_is_offloaded(full) or kind not in {*ADAM_LIKE, "muon"}:
        return
    params.setdefault("torch_adam", True)
    if params["torch_adam"] and kind == "adamw":
        params.setdefault("fused", True)


def optimizer_is_offloaded(document: dict[str, Any]) -> bool:
    """Whether optimizer states live in CPU memory or on NVMe."""
    return offload_place(document, "offload_optimizer") != "none"


class Buckets(NamedTuple):
    """Through which ZeRO's gradients pass on their way to other ranks."""

    elements: int
    number: int  # two where messages overlap with computing, none where gradients are not copied together


def gradient_buckets(document: Mapping[str, Any]) -> Buckets:
    """Of a complete JSON, with DeepSpeed's defaults (deepspeed/runtime/zero/config.py)."""
    zero = document["zero_optimization"]
    if not zero.get("contiguous_gradients", True) and not optimizer_is_offloaded(dict(document)):
        return Buckets(0, 0)
    overlaps = zero.get("overlap_comm", zero["stage"] == 3)
    return Buckets(int(zero.get("reduce_bucket_size", MAX_BUCKET_ELEMENTS)), 2 if overlaps else 1)


def _section(document: dict[str, Any], key: str) -> dict[str, Any]:
    return dict(document.get(key) or {})


def _filled(document: dict[str, Any], path: str, value: Any) -> Any:
    stated = get(document, path)
    return value if stated in (None, AUTO) else stated


class _RepeatedKey(Exception):
    pass


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise _RepeatedKey(repr(key))
    return dict(pairs)
