"""The model's weights as files that any layout can read: one safetensors file per layer and tensor rank.

They stand beside DeepSpeed's own files in every checkpoint, under the plan's names, with each tensor's place in
the undivided model in the header.  Generation, export and a start from other weights read these; exact resume
reads DeepSpeed's.  A tied head is not written: it is the embedding.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from model_providers.logical import LogicalParameter, describe_parameter, merge, split
from pretrain.errors import RunError


def file_name(layer: str, tp_rank: int) -> str:
    return f"{layer}.tp{tp_rank:02d}.safetensors"


class WeightFolder:
    """Weights on disk, of whatever layout wrote them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(folder.glob("*.tp[0-9][0-9].safetensors")):
            self.files[path.name.rsplit(".tp", 1)[0]].append(path)
        if not self.files:
            raise RunError(f"weights={folder}: no weight files there; name a checkpoint's folder")

    def layer(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and undivided tensors of one layer."""
        if name not in self.files:
            raise RunError(f"weights={self.folder}: no layer {name!r}; there are {', '.join(self.files)}")
        shards = [_read_layer(path) for path in self.files[name]]
        descriptions = shards[0][1]
        for key, description in descriptions.items():
            yield key, merge([tensors[key] for tensors, _ in shards], description)


class WeightLoader:
    """Fills layers with weights from disk as they are built (a ``prepare`` step of `engine.layers.build_layers`)."""

    def __init__(self, folder: Path, *, tp_rank: int, tp: int, tied: Collection[str]):
        self._source, self._tp_rank, self._tp, self._tied = WeightFolder(folder), tp_rank, tp, tied

    @torch.no_grad()
    def __call__(self, name: str, module: nn.Module) -> None:
        wanted = {key: p for key, p in module.named_parameters() if f"{name}.{key}" not in self._tied}
        found = dict(self._source.layer(name)) if wanted else {}
        _compare_names(name, set(wanted), set(found), self._source.folder)
        for key, parameter in wanted.items():
            description = describe_parameter(key, parameter, self._tp)
            if tuple(found[key].shape) != description.shape:
                raise RunError(
                    f"weights={self._source.folder}: {name}.{key} is {list(found[key].shape)} there and "
                    f"{list(description.shape)} in this model; the model section must be the one it was "
                    "trained with"
                )
            parameter.copy_(split(found[key], description, self._tp_rank, self._tp))


def write_layer(path: Path, parameters: dict[str, nn.Parameter], *, tp: int) -> None:
    """This tensor rank's share of one layer."""
    descriptions = {
        name: describe_parameter(name, parameter, tp)._asdict() for name, parameter in parameters.items()
    }
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    save_file(tensors, path, metadata={"tp": str(tp), "parameters": json.dumps(descriptions)})


def _read_layer(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, LogicalParameter]]:
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["parameters"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    return tensors, {
        key: LogicalParameter(**{**d, "shape": tuple(d["shape"])}) for key, d in described.items()
    }


def _compare_names(layer: str, wanted: set[str], found: set[str], folder: Path) -> None:
    if wanted != found:
        missing, surplus = sorted(wanted - found), sorted(found - wanted)
        raise RunError(
            f"weights={folder}: layer {layer} does not fit this model (missing {missing}, surplus "
            f"{surplus}); the model section must be the one it was trained with"
        )
