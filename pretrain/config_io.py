"""From files and words on a command line to one checked `Run`; back to YAML for the run folder.

Order of precedence, lowest first: defaults, the model's preset, values that only the DeepSpeed JSON states, the
run file, `key=value` words.  `Run.origins` remembers which of these each value came from.  All faults are told
in one message, before any process starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_tools.corpus import Corpus
from data_tools.errors import DataError
from data_tools.manifest import load_manifest
from data_tools.special_tokens import special_tokens
from data_tools.tokenizer import load_tokenizer
from model_providers.config import ModelConfig
from model_providers.cost import layer_costs, parameters
from model_providers.errors import ModelError
from model_providers.layout import Layout
from model_providers.loss_chunks import chunk_tokens
from model_providers.partition import partition_by
from model_providers.presets import get_preset
from pretrain import config_rules, ds_config
from pretrain.config import RunConfig, spelled_out
from pretrain.errors import RunError
from pretrain.nested import NoSection, get, leaves, put
from pretrain.run_file import parse_words, plain, read_yaml

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
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

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
    def chunk_tokens(self) -> int | None:
        """Of the head and its loss; None: a micro-batch's logits are made whole."""
        config = self.config
        length = config.target_length or config.data.sequence_length
        return chunk_tokens(
            config.loss.chunk_tokens,
            config.model,
            num_tokens=self.micro_size * length,
            tp=self.layout.tp,
        )

    @property
    def largest_shard(self) -> int:
        return largest_shard(self.config.model, self.layout)

    @property
    def shard_elements(self) -> int:
        """Parameters that one rank keeps under ZeRO-3."""
        return parameters_per_rank(self.config.model, self.layout) // self.layout.dp

    @cached_property
    def stage_bounds(self) -> tuple[int, ...]:
        """The first layer of each virtual pipeline stage, and the number of layers."""
        costs = layer_costs(
            self.config.model, self.config.data.sequence_length, target_length=self.config.target_length
        )
        return tuple(
            partition_by(
                self.config.layout.partition,
                [cost.parameters for cost in costs],
                [cost.forward_flops_per_token for cost in costs],
                self.layout.virtual_stages,
            )
        )

    @cached_property
    def parameters(self) -> int:
        """Of the whole model."""
        return parameters(self.config.model)


def load_run(
    path: str | Path,
    words: Sequence[str] = (),
    *,
    world_size: int,
    deepspeed_config: str | None = None,
    is_planned: bool = False,
) -> Run:
    """Read and check a run; raises `RunError` with every fault that was found.

    ``is_planned``: it will run elsewhere, so nothing is asked of this machine: no corpus, no folder, no checkpoint.
    """
    path = Path(path)
    return run_with(
        read_yaml(path),
        words,
        world_size=world_size,
        run_name=path.name,
        deepspeed_config=deepspeed_config,
        is_planned=is_planned,
    )


def run_with(
    raw: dict[str, Any],
    words: Sequence[str],
    *,
    world_size: int,
    run_name: str,
    deepspeed_config: str | None = None,
    is_planned: bool = False,
) -> Run:
    """A checked `Run` from a plain nested dict and `key=value` words that go before it."""
    raw = spelled_out(raw)
    origins = {key: run_name for key, _ in leaves(raw)}
    for key, value in parse_words(words):
        try:
            put(raw, key, value)
        except NoSection as section:
            raise RunError(
                f"{key}={value}: {section} is one value and has no parts; set {section} itself"
            ) from None
        raw = spelled_out(raw)
        origins = {k: v for k, v in origins.items() if not k.startswith(f"{key}.")}
        origins |= {k: "command line" for k, _ in leaves(raw) if k == key or k.startswith(f"{key}.")}
    if deepspeed_config is not None:
        raw["deepspeed"] = deepspeed_config
        origins["deepspeed"] = "command line"
    return make_run(raw, world_size=world_size, run_name=run_name, origins=origins, is_planned=is_planned)


def make_run(
    raw: dict[str, Any],
    *,
    world_size: int,
    run_name: str = "run file",
    origins: Mapping[str, str] | None = None,
    is_planned: bool = False,
) -> Run:
    """A checked `Run` from a plain nested dict."""
    raw = spelled_out(raw)
    json_path = find_deepspeed_json(str(raw.get("deepspeed", RunConfig.model_fields["deepspeed"].default)))
    document = ds_config.read_json(json_path)
    reading = ds_config.bring_together(document, raw, json_name=json_path.name, run_name=run_name)
    known = dict(origins or {key: run_name for key, _ in leaves(raw)})
    known |= dict.fromkeys(reading.taken, json_path.name)
    _expand_preset(reading.run, known)
    config = _validate(reading.run, reading.faults)
    if not is_planned or config.model.vocab_size is None:
        way_out = "; or set model.vocab_size" if is_planned else ""
        config = _with_vocabulary(config, reading.faults, known, way_out=way_out)
    layout, batch = config_rules.sizes(config, world_size, reading.faults)
    if reading.faults:
        raise RunError(_told_together(reading.faults))
    assert layout is not None and batch is not None
    facts = _facts(config, layout, batch)
    run = Run(config, ds_config.complete(document, facts), layout, known)
    faults = config_rules.faults(run, is_planned=is_planned)
    if faults:
        raise RunError(_told_together(faults))
    return run


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


def _expand_preset(raw: dict[str, Any], origins: dict[str, str]) -> None:
    model = raw.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return
    stated = {key: value for key, value in model.items() if key != "preset"}
    name = str(model["preset"])
    try:
        preset = get_preset(name).model_dump()
    except ModelError as fault:
        raise RunError(f"model.{fault}") from None
    for (
        key,
        value,
    ) in stated.items():  # a part's own keys go before the preset's; another kind is another part
        if isinstance(value, dict) and isinstance(preset.get(key), dict) and "kind" not in value:
            stated[key] = {**preset[key], **value}
    raw["model"] = {**preset, **stated}
    origins.pop("model.preset", None)
    for key in preset:
        origins.setdefault(f"model.{key}", f"preset {name}")


def _validate(raw: dict[str, Any], faults: list[str]) -> RunConfig:
    try:
        config = RunConfig(**raw)
    except ValidationError as error:
        raise RunError(_told_together([*faults, *plain(error)])) from None
    read = config.model_dump()
    for key, value in leaves(raw):  # pydantic takes `true` for 1
        if isinstance(value, bool) and not isinstance(get(read, key), bool):
            faults.append(f"{key}={value}: must be a number")
    return config


def _with_vocabulary(
    config: RunConfig, faults: list[str], origins: dict[str, str], *, way_out: str = ""
) -> RunConfig:
    """The tokenizer's vocabulary where the model states none; a model too small for it is a fault."""
    corpus = config.data.train[0].path
    try:
        size = _tokenizer_size(config)
    except DataError as fault:
        faults.append(f"data: {fault}{way_out}")
        return config
    stated = config.model.vocab_size
    if stated is None:
        origins["model.vocab_size"] = f"tokenizer of {corpus}"
        return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
    if stated < size:
        faults.append(
            f"model.vocab_size={stated}: the tokenizer of {corpus} has {size} ids; set model.vocab_size=null to "
            "take its size, or prepare the corpus with the model's tokenizer"
        )
    return config


def _tokenizer_size(config: RunConfig) -> int:
    """With the tokens that the objective appends."""
    prefix, named = config.data.train[0].path, config.data.tokenizer
    manifest = load_manifest(prefix)
    if manifest is None and named is None:
        raise DataError(
            f"data.train={prefix}: no such corpus, or it has no manifest: prepare it "
            f"(megaloom prepare --out {prefix}), or name its tokenizer in data.tokenizer"
        )
    if config.data.objective is None and manifest is not None:
        return manifest.tokenizer.vocab_size
    tokenizer = load_tokenizer(named) if named is not None else Corpus(prefix).tokenizer()
    return special_tokens(tokenizer, config.data.objective).vocab_size


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
        parameters_per_rank=parameters_per_rank(config.model, layout),
        largest_shard=largest_shard(config.model, layout),
    )


def parameters_per_rank(model: ModelConfig, layout: Layout) -> int:
    """On average over the stages, before ZeRO divides them."""
    experts = sum(cost.expert_parameters for cost in layer_costs(model, 1))
    dense = (parameters(model) - experts) // layout.tp
    return (dense + experts // (layout.ep * layout.expert_tp)) // layout.pp


def largest_shard(model: ModelConfig, layout: Layout) -> int:
    """Elements of the largest parameter's share on one rank under ZeRO-3, rounded up for alignment."""
    width = model.hidden_size
    rows = max(
        model.padded_vocab_size,
        model.query_width + 2 * model.kv_width,
        model.ffn_width * (2 if model.is_gated else 1),
    )
    shares = [(rows * width, layout.tp * layout.dp)]
    if model.moe is not None:
        experts = model.moe.num_experts * model.moe.ffn_hidden_size * (2 if model.is_gated else 1) * width
        copies = max(1, layout.expert_dp) if layout.ep > 1 else layout.dp  # that ZeRO knows of
        shares.append((experts, layout.ep * layout.expert_tp * copies))
    return max(-(-size // (parts * SHARD_ALIGNMENT)) * SHARD_ALIGNMENT for size, parts in shares)


def _told_together(faults: Sequence[str]) -> str:
    if len(faults) == 1:
        return faults[0]
    return "\n".join([f"{len(faults)} faults:", *(f"  - {fault}" for fault in faults)])
