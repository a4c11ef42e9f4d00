"""A checkpoint of any layout to a folder that transformers opens, and such a folder to a checkpoint.

Tensors pass one after the other: in memory is one layer, and on its way out one shard.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data_tools.errors import DataError
from data_tools.special_tokens import special_tokens
from data_tools.tokenizer import ByteTokenizer, load_tokenizer
from data_tools.tokenizer_export import complete
from data_tools.tokenizer_files import TOKENIZER_FILE
from model_providers.building import solo_groups
from model_providers.config import ModelConfig
from model_providers.families import build_plan
from model_providers.hugging_face import entries
from model_providers.hugging_face.architectures import config_to_hugging_face, model_from_hugging_face
from model_providers.hugging_face.weights import entries_of, their_name, without_heads
from model_providers.layout import Layout, TensorPlace
from pretrain.checkpoint import manifest, store
from pretrain.checkpoint.store import CONFIG, TOKENIZER, WEIGHTS
from pretrain.checkpoint.weights import WeightFolder, state_of, write_layer
from pretrain.config import RunConfig
from pretrain.engine.layers import tied_names
from pretrain.errors import RunError
from pretrain.run_file import read_yaml, to_yaml

MODEL_CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


def export_checkpoint(checkpoint: Path, out: Path, *, dtype: str | None, shard_bytes: int) -> list[str]:
    """Write ``out``; what a user should know of it.  ``dtype``: None keeps that of the checkpoint."""
    _refuse_existing(out)
    config = RunConfig(**read_yaml(checkpoint / CONFIG))
    model = config.model
    facts = config_to_hugging_face(model) | {"bos_token_id": None, "pad_token_id": None}
    tokenizer, objective = load_tokenizer(str(checkpoint / TOKENIZER)), config.data.objective
    special = special_tokens(tokenizer, objective)
    try:
        end = tokenizer.end_of_document
    except DataError:  # a corpus may have been prepared without
        end = None
    with _Whole(out) as folder:
        weights = _Layers(WeightFolder(checkpoint / WEIGHTS))
        named = _converted(weights, model, DTYPES[dtype] if dtype is not None else None)
        kept = _write_shards(named, folder, shard_bytes)
        facts |= {"dtype": str(kept).removeprefix("torch."), "eos_token_id": end}
        if "padding" in special.ids:
            facts["pad_token_id"] = special["padding"]
        if model.t5 is not None and "padding" in special.ids:
            facts["decoder_start_token_id"] = special["padding"]
        (folder / MODEL_CONFIG).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
        if isinstance(tokenizer, ByteTokenizer):
            return ["the tokenizer is plain bytes, which transformers does not have: no tokenizer files"]
        shutil.copytree(checkpoint / TOKENIZER, folder, dirs_exist_ok=True)
        if (folder / TOKENIZER_FILE).is_file():
            complete(folder, objective, special, end_of_document=end)
    return []


def import_checkpoint(source: Path, out: Path, *, sequence_length: int | None = None) -> list[str]:
    """Write a checkpoint of weights alone under the run folder ``out``, for `weights_from` and `generate`; what a user
    should know of it.
    """
    _refuse_existing(out)
    theirs = _read_config(source)
    model = model_from_hugging_face(theirs)
    files = _Files(source, model)
    dtype = next(iter(files.values())).dtype
    plan = build_plan(
        model,
        Layout(tp=1, pp=1, dp=1),
        solo_groups(),
        seed=0,
        sequence_length=min(sequence_length or model.max_sequence_length, model.max_sequence_length),
        params_dtype=dtype,
        device=torch.device("cpu"),
        kernels="torch",
    )
    absent = without_heads(files, model)
    tied, wanted = tied_names(plan), [entry for entry in entries_of(model) if entry not in absent]
    with _Whole(out) as root:
        folder = store.partial_folder(root / "checkpoints", 0)
        (folder / WEIGHTS).mkdir()
        for layer in plan.layers:
            own = [entry for entry in wanted if entry.ours.startswith(f"{layer.name}.")]
            state = _filled(layer.build(), layer.name, entries.read(own, files, model), tied)
            write_layer(folder / WEIGHTS, layer.name, state, TensorPlace(), dense=True, experts=True)
        config = _run_config(out.name, model, sequence_length)
        (folder / CONFIG).write_text(to_yaml(config), "utf-8")
        _keep_tokenizer(source, folder / TOKENIZER)
        store.complete(folder, [manifest.record(folder, path) for path in manifest.files_of(folder)])
    if not absent:
        return []
    return [f"an encoder alone: {', '.join(entry.ours for entry in absent)} keep initial weights"]


class _Whole:
    """A folder that is written beside its place, and moved there when it is complete."""

    def __init__(self, final: Path):
        self._final, self._partial = final, final.with_name(final.name + store.PARTIAL)

    def __enter__(self) -> Path:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self._partial

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self._partial.rename(self._final)
        else:
            shutil.rmtree(self._partial)


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise RunError(f"--out={out}: exists already; name a folder that does not, or remove it")


class _Layers(Mapping[str, torch.Tensor]):
    """Our parameters by name, read layer by layer; the last two layers stay at hand."""

    def __init__(self, folder: WeightFolder):
        self._folder, self._held = folder, dict[str, dict[str, torch.Tensor]]()

    def __getitem__(self, name: str) -> torch.Tensor:
        layer = next(layer for layer in self._folder.files if name.startswith(f"{layer}."))
        if layer not in self._held:
            kept = list(self._held.items())[-1:]
            self._held = dict(kept) | {layer: dict(self._folder.layer(layer))}
        return self._held[layer][name.removeprefix(f"{layer}.")]

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


class _Files(Mapping[str, torch.Tensor]):
    """Tensors of a folder's safetensors files under their names."""

    def __init__(self, folder: Path, model: ModelConfig):
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            others = "; it has pickled weights, which must be saved as safetensors first"
            raise RunError(
                f"source={folder}: no *.safetensors there{others if any(folder.glob('*.bin')) else ''}"
            )
        self._folder, self._places = folder, dict[str, tuple[Any, str]]()
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise RunError(f"source={folder}: {path.name} cannot be read: {error}") from None
            self._places |= {their_name(name, model): (file, name) for name in file.keys()}  # noqa: SIM118
        if (folder / INDEX).is_file():
            listed = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            missing = sorted({name for name in listed.values() if not (folder / name).is_file()})
            if missing:
                raise RunError(f"source={folder}: {missing[0]} is missing, which {INDEX} lists")

    def __getitem__(self, name: str) -> torch.Tensor:
        file, key = self._places[name]
        return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _converted(
    weights: Mapping[str, torch.Tensor], model: ModelConfig, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for entry in entries_of(model):
        for name, tensor in entries.write([entry], weights, model).items():
            yield name, (tensor if dtype is None else tensor.to(dtype))


def _write_shards(
    named: Iterator[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int
) -> torch.dtype | None:
    """Files of at most ``shard_bytes``, and their index if there are several; the weights' number format."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0
    dtype = None

    def flush() -> None:
        save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in named:
        dtype = dtype or tensor.dtype
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor.clone() if tensor._is_view() else tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return dtype
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return dtype


def _read_config(source: Path) -> dict[str, Any]:
    path = source / MODEL_CONFIG
    if not path.is_file():
        raise RunError(
            f"source={source}: no {MODEL_CONFIG} there; give a folder as transformers saves a model"
        )
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"source={source}: {MODEL_CONFIG} is broken JSON ({error})") from None


@torch.no_grad()
def _filled(
    module: nn.Module, layer: str, found: Mapping[str, torch.Tensor], tied: set[str]
) -> dict[str, torch.Tensor]:
    """The layer's state with their values; what they do not have, such as a balance bias, stays initial."""
    state = {key: tensor for key, tensor in state_of(module).items() if f"{layer}.{key}" not in tied}
    for key, tensor in state.items():
        if f"{layer}.{key}" in found:
            tensor.copy_(found[f"{layer}.{key}"])
    return state


def _run_config(name: str, model: ModelConfig, sequence_length: int | None) -> RunConfig:
    length = sequence_length or model.max_sequence_length
    data = {"train": "none", "sequence_length": min(length, model.max_sequence_length)}
    return RunConfig(name=name, model=model, data=data, train={"steps": 1})  # type: ignore[arg-type]


def _keep_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir()
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    for path in found:
        shutil.copy(path, folder)
    try:
        load_tokenizer(str(folder))
    except DataError as error:
        raise RunError(f"source={source}: its tokenizer cannot be read: {error}") from None
