"""From files and words on a command line to one checked `Run`; back to YAML for the run folder.

Order of precedence, lowest first: defaults, the model's preset, values that only the DeepSpeed JSON states, the
run file, `key=value` words.  `Run.origins` remembers which of these each value came from.  All faults are told
in one message, before any process starts.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from data_tools.errors import DataError
from data_tools.manifest import load_manifest
from data_tools.tokenizer import load_tokenizer
from model_providers.config import ModelConfig
from model_providers.cost import parameters
from model_providers.errors import ModelError
from model_providers.layout import Layout
from model_providers.presets import get_preset
from pretrain import config_rules, ds_config
from pretrain.config import RunConfig
from pretrain.errors import RunError

SHARD_ALIGNMENT = 1024  # elements; DeepSpeed pads shards to whole blocks of asynchronous I/O


@dataclass(frozen=True)
class Run:
    """A run file and its DeepSpeed JSON, complete and in agreement, for a world of a known size."""

    config: RunConfig
    deepspeed: Mapping[str, Any]
    layout: Layout
    origins: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Where this run writes everything."""
        return Path(self.config.out) / self.config.name

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed["zero_optimization"]["stage"])

    @property
    def micro_size(self) -> int:
        """Samples per micro-batch."""
        return int(self.deepspeed["train_micro_batch_size_per_gpu"])

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one rank per optimizer step."""
        return int(self.deepspeed["gradient_accumulation_steps"])

    @property
    def global_size(self) -> int:
        """Samples per optimizer step."""
        return int(self.deepspeed["train_batch_size"])

    @property
    def tokens_per_step(self) -> int:
        return self.global_size * self.config.data.sequence_length

    @property
    def largest_shard(self) -> int:
        return largest_shard(self.config.model, self.layout)

    @cached_property
    def parameters(self) -> int:
        """Of the whole model."""
        return parameters(self.config.model)


def load_run(
    path: str | Path, words: Sequence[str] = (), *, world_size: int, deepspeed_config: str | None = None
) -> Run:
    """Read and check a run; raises `RunError` with every fault that was found."""
    path = Path(path)
    raw = read_yaml(path)
    origins = {key: path.name for key, _ in ds_config.leaves(raw)}
    for key, value in parse_words(words):
        ds_config.put(raw, key, value)
        origins = {k: v for k, v in origins.items() if not k.startswith(f"{key}.")} | {key: "command line"}
    if deepspeed_config is not None:
        raw["deepspeed"] = deepspeed_config
        origins["deepspeed"] = "command line"
    return make_run(raw, world_size=world_size, run_name=path.name, origins=origins)


def make_run(
    raw: dict[str, Any],
    *,
    world_size: int,
    run_name: str = "run file",
    origins: Mapping[str, str] | None = None,
) -> Run:
    """A checked `Run` from a plain nested dict."""
    json_path = find_deepspeed_json(str(raw.get("deepspeed", RunConfig.model_fields["deepspeed"].default)))
    document = ds_config.read_json(json_path)
    reading = ds_config.bring_together(document, raw, json_name=json_path.name, run_name=run_name)
    known = dict(origins or {key: run_name for key, _ in ds_config.leaves(raw)})
    known |= dict.fromkeys(reading.taken, json_path.name)
    _expand_preset(reading.run, known)
    config = _validate(reading.run, reading.faults, run_name)
    config = _with_vocabulary(config, reading.faults, known)
    layout, batch = config_rules.sizes(config, world_size, reading.faults)
    if reading.faults:
        raise RunError(_told_together(reading.faults))
    assert layout is not None and batch is not None
    facts = _facts(config, layout, batch)
    run = Run(config, ds_config.complete(document, facts), layout, known)
    faults = config_rules.faults(run)
    if faults:
        raise RunError(_told_together(faults))
    return run


def read_yaml(path: Path) -> dict[str, Any]:
    """A run file as a nested dict; one line if it is missing or broken."""
    try:
        raw = yaml.load(path.read_text("utf-8"), Loader=_StrictLoader)
    except (FileNotFoundError, IsADirectoryError):
        raise RunError(f"{path}: no such run file{_nearby(path)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise RunError(f"{path}: not valid YAML: {' '.join(str(fault).split())}") from None
    if not isinstance(raw, dict):
        raise RunError(f"{path}: must hold keys and values, such as `model: {{preset: demo}}`")
    return raw


def parse_words(words: Iterable[str]) -> Iterable[tuple[str, Any]]:
    """``a.b=c`` words of a command line, values read as YAML."""
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise RunError(f"{word!r}: overrides are written key=value, such as train.steps=100")
        try:
            yield key, yaml.load(value, Loader=_StrictLoader)
        except yaml.YAMLError as fault:
            raise RunError(f"{word!r}: the value is not valid YAML: {' '.join(str(fault).split())}") from None


def find_deepspeed_json(name: str) -> Path:
    """A path as given, or a file of the ``ds_configs`` folder that ships with Megaloom."""
    if Path(name).exists() or "/" in name:
        return Path(name)
    shipped = Path(str(resources.files("ds_configs").joinpath(name)))
    if not shipped.exists():
        choices = sorted(file.name for file in shipped.parent.glob("*.json"))
        raise RunError(
            f"deepspeed={name}: neither a file here nor in ds_configs, which has {', '.join(choices)}"
        )
    return shipped


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that `load_run` reads back."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, width=110)


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error and ``1e-4`` is a number (YAML 1.1 calls it a string)."""


# YAML 1.1 wants a dot and a sign in 1.0e+4; this is YAML 1.2's rule (section 10.3.2).
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands twice", node.start_mark
            )
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)


def _expand_preset(raw: dict[str, Any], origins: dict[str, str]) -> None:
    model = raw.get("model")
    if isinstance(model, str):
        model = {"preset": model}
    if not isinstance(model, dict) or "preset" not in model:
        return
    stated = {key: value for key, value in model.items() if key != "preset"}
    name = str(model["preset"])
    try:
        preset = get_preset(name).model_dump()
    except ModelError as fault:
        raise RunError(f"model.preset={name}: {fault}") from None
    raw["model"] = {**preset, **stated}
    origins.pop("model.preset", None)
    for key in preset:
        origins.setdefault(f"model.{key}", f"preset {name}")


def _validate(raw: dict[str, Any], faults: list[str], run_name: str) -> RunConfig:
    try:
        return RunConfig(**raw)
    except ValidationError as error:
        raise RunError(
            _told_together([*faults, *(f"{run_name}: {line}" for line in _plain(error))])
        ) from None


def _plain(error: ValidationError) -> Iterable[str]:
    """pydantic's report as lines of ``key=value: what is wrong``."""
    for item in error.errors():
        place = [str(part) for part in item["loc"] if not _is_union_tag(part)]
        key = ".".join(place)
        if item["type"] == "extra_forbidden":
            yield f"{key}: no such key{_nearest_field(place)}"
        elif item["type"] == "missing":
            yield f"{key}: must be given"
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:] if not message[:2].isupper() else message
            yield f"{key}={item['input']!r}: {message}" if place else message


def _is_union_tag(part: object) -> bool:
    """pydantic puts the chosen member of a union into the place; a user did not write it."""
    tags = {
        "cosine",
        "linear",
        "wsd",
        "constant",
        "inverse_square_root",
        "power",
        "literal['parameters','cost','uniform']",
    }
    return isinstance(part, str) and (part in tags or part.startswith(("tuple[", "literal[", "function-")))


def _nearest_field(place: Sequence[str]) -> str:
    owner: Any = RunConfig
    for part in place[:-1]:
        info = (
            owner.model_fields.get(part) if isinstance(owner, type) and issubclass(owner, BaseModel) else None
        )
        owner = _model_of(info.annotation) if info else None
    names: set[str] = set()
    for model in _models(owner):
        names |= set(model.model_fields)
    close = difflib.get_close_matches(place[-1], sorted(names), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(sorted(names))}" if names else ""


def _model_of(annotation: Any) -> Any:
    return annotation


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for argument in get_args(annotation):
        yield from _models(argument)


def _with_vocabulary(config: RunConfig, faults: list[str], origins: dict[str, str]) -> RunConfig:
    """The tokenizer's vocabulary where the model states none; a model too small for it is a fault."""
    corpus = config.data.train[0].path
    try:
        size = _tokenizer_size(config)
    except DataError as fault:
        faults.append(f"data: {fault}")
        return config
    stated = config.model.vocab_size
    if stated is None:
        origins["model.vocab_size"] = f"tokenizer of {corpus}"
        return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
    if stated < size:
        faults.append(
            f"model.vocab_size={stated}: the tokenizer of {corpus} has {size} ids; leave model.vocab_size "
            "out, or prepare the corpus with the model's tokenizer"
        )
    return config


def _tokenizer_size(config: RunConfig) -> int:
    manifest = load_manifest(config.data.train[0].path)
    if manifest is not None:
        return manifest.tokenizer.vocab_size
    if config.data.tokenizer is None:
        raise DataError(
            f"data.train={config.data.train[0].path}: no such corpus, or it has no manifest: prepare it "
            f"(megaloom prepare --out {config.data.train[0].path}), or name its tokenizer in data.tokenizer"
        )
    return load_tokenizer(config.data.tokenizer).vocab_size


def _facts(config: RunConfig, layout: Layout, batch: "config_rules.BatchSizes") -> ds_config.Facts:
    optimizer = config.optimizer
    return ds_config.Facts(
        train_batch_size=batch.global_size,
        train_micro_batch_size_per_gpu=batch.micro_size,
        gradient_accumulation_steps=batch.accumulation_steps,
        gradient_clipping=optimizer.gradient_clipping,
        optimizer=optimizer.model_dump(include={"type", "lr", "betas", "eps", "weight_decay", "params"}),
        dtype=config.precision.dtype,
        accumulate=config.precision.accumulate,
        tensorboard=config.monitor.tensorboard,
        folder=str(Path(config.out) / config.name),
        nvme_path=config.nvme_path,
        hidden_size=config.model.hidden_size,
        parameters_per_rank=parameters(config.model) // (layout.tp * layout.pp),
        largest_shard=largest_shard(config.model, layout),
    )


def largest_shard(model: ModelConfig, layout: Layout) -> int:
    """Elements of the largest parameter's share on one rank under ZeRO-3, rounded up for alignment."""
    width = model.hidden_size
    rows = max(
        model.padded_vocab_size,
        model.query_width + 2 * model.kv_width,
        model.ffn_width * (2 if model.is_gated else 1),
    )
    return -(-rows * width // (layout.tp * layout.dp * SHARD_ALIGNMENT)) * SHARD_ALIGNMENT


def _told_together(faults: Sequence[str]) -> str:
    if len(faults) == 1:
        return faults[0]
    return "\n".join([f"{len(faults)} faults:", *(f"  - {fault}" for fault in faults)])


def _nearby(path: Path) -> str:
    shipped = sorted(Path(str(resources.files("pretrain").joinpath("runs"))).glob("*.yaml"))
    names = [f"{file.parent.parent.name}/runs/{file.name}" for file in shipped]
    return f"; there are {', '.join(names)}" if names else ""
