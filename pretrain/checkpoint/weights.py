"""The model's weights as files that any layout can read: safetensors of each layer's share on each tensor rank.

They stand beside DeepSpeed's own files in every checkpoint, under the plan's names, with each tensor's place in
the undivided model in the header.  Routed experts are in files of their own, one for each rank that shares them out.
Generation, export and a start from other weights read these; exact resume reads DeepSpeed's.  What is tied to another
layer's weight is not written.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from model_providers.layout import TensorPlace
from model_providers.logical import LogicalParameter, describe_parameter, is_routed_expert, merge, split
from pretrain.errors import RunError

FILE = re.compile(r"(?P<layer>.+)\.(?P<kind>tp|experts)(?P<share>\d+)\.safetensors")

BIAS = "router.expert_bias"  # zero at first: a model that had none is as one that begins

Described = tuple[dict[str, torch.Tensor], dict[str, LogicalParameter]]


class WeightFolder:
    """Weights on disk, of whatever layout wrote them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, list[Path]] = defaultdict(list)
        self.expert_files: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(folder.glob("*.safetensors")):
            name = FILE.fullmatch(path.name)
            if name is not None:
                (self.files if name["kind"] == "tp" else self.expert_files)[name["layer"]].append(path)
        if not self.files:
            raise RunError(f"weights={folder}: no weight files there; name a checkpoint's folder")

    def layer(self, name: str, *, ep_rank: int = 0, ep: int = 1) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and undivided tensors of one layer; of experts only the part of ``ep`` that ``ep_rank`` holds."""
        if name not in self.files:
            raise RunError(f"weights={self.folder}: no layer {name!r}; there are {', '.join(self.files)}")
        yield from _merged([_read_layer(path) for path in self.files[name]])
        if name in self.expert_files:
            yield from self._experts(name, ep_rank, ep)

    def _experts(self, name: str, ep_rank: int, ep: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Files are read only where they overlap with what is wanted."""
        paths = self.expert_files[name]
        their_ep = _number_of_parts(paths[0])
        etp = len(paths) // their_ep
        first, last = ep_rank * their_ep // ep, -(-(ep_rank + 1) * their_ep // ep)  # of their parts
        parts = [
            dict(_merged([_read_layer(path) for path in paths[p * etp : (p + 1) * etp]]))
            for p in range(first, last)
        ]
        for key in parts[0]:
            some = torch.cat([part[key] for part in parts])
            per_part = len(parts[0][key])
            size = per_part * their_ep // ep
            start = ep_rank * size - first * per_part
            yield key, some[start : start + size]


class WeightLoader:
    """Fills layers with weights from disk as they are built (a ``prepare`` step of `engine.layers.build_layers`)."""

    def __init__(self, folder: Path, place: TensorPlace, *, tied: Collection[str] = ()):
        self._source, self._place, self._tied = WeightFolder(folder), place, tied

    @torch.no_grad()
    def __call__(self, name: str, module: nn.Module) -> None:
        wanted = {
            key: tensor for key, tensor in state_of(module).items() if f"{name}.{key}" not in self._tied
        }
        found = (
            dict(self._source.layer(name, ep_rank=self._place.ep_rank, ep=self._place.ep)) if wanted else {}
        )
        wanted = {key: tensor for key, tensor in wanted.items() if key in found or not key.endswith(BIAS)}
        _compare_names(name, set(wanted), set(found), self._source.folder)
        for key in wanted:
            self._fill(f"{name}.{key}", wanted[key], found[key])

    def _fill(self, name: str, tensor: torch.Tensor, found: torch.Tensor) -> None:
        # Of experts only this rank's were read.
        place = self._place._replace(ep=1, ep_rank=0) if is_routed_expert(tensor) else self._place
        description = describe_parameter(name, tensor, place)
        if tuple(found.shape) != description.shape:
            raise RunError(
                f"weights={self._source.folder}: {name} is {list(found.shape)} there and "
                f"{list(description.shape)} in this model; the model section must be the one it was "
                "trained with"
            )
        tensor.copy_(split(found, description, place))


class ExpertRestorer(WeightLoader):
    """Puts back the routed experts alone: DeepSpeed's files have those of the first replica only."""

    @torch.no_grad()
    def __call__(self, name: str, module: nn.Module) -> None:
        wanted = {key: tensor for key, tensor in state_of(module).items() if is_routed_expert(tensor)}
        if wanted:
            found = dict(self._source.layer(name, ep_rank=self._place.ep_rank, ep=self._place.ep))
            for key, tensor in wanted.items():
                self._fill(f"{name}.{key}", tensor, found[key])


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """What makes the layer what it is: parameters, and buffers that are saved, such as a router's bias."""
    state: dict[str, torch.Tensor] = dict(module.named_parameters())
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                state[f"{prefix}.{name}".removeprefix(".")] = buffer
    return state


def write_layer(
    folder: Path,
    layer: str,
    state: Mapping[str, torch.Tensor],
    place: TensorPlace,
    *,
    dense: bool,
    experts: bool,
) -> None:
    """This rank's share of one layer: its dense part, its routed experts, or both."""
    apart: dict[bool, dict[str, torch.Tensor]] = {False: {}, True: {}}
    for name, tensor in state.items():
        apart[is_routed_expert(tensor)][name] = tensor
    if dense:
        _write(folder / f"{layer}.tp{place.tp_rank:02d}.safetensors", apart[False], place)
    if experts and apart[True]:
        _write(folder / f"{layer}.experts{place.expert_share:05d}.safetensors", apart[True], place)


def _write(path: Path, state: Mapping[str, torch.Tensor], place: TensorPlace) -> None:
    descriptions = {name: describe_parameter(name, tensor, place)._asdict() for name, tensor in state.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(
        tensors,
        path,
        metadata={"tp": str(place.tp), "ep": str(place.ep), "parameters": json.dumps(descriptions)},
    )


def _merged(shares: list[Described]) -> Iterator[tuple[str, torch.Tensor]]:
    for key, description in shares[0][1].items():
        yield key, merge([tensors[key] for tensors, _ in shares], description)


def _read_layer(path: Path) -> Described:
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["parameters"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    return tensors, {
        key: LogicalParameter(**{**d, "shape": tuple(d["shape"])}) for key, d in described.items()
    }


def _number_of_parts(path: Path) -> int:
    """Over how many ranks the layout that wrote it shared out its experts."""
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["ep"])


def _compare_names(layer: str, wanted: set[str], found: set[str], folder: Path) -> None:
    if wanted != found:
        missing, surplus = sorted(wanted - found), sorted(found - wanted)
        raise RunError(
            f"weights={folder}: layer {layer} does not fit this model (missing {missing}, surplus "
            f"{surplus}); the model section must be the one it was trained with"
        )
