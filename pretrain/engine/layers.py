"""A run of a plan's layers as one torch module: the whole model for ZeRO, a stage's share for a pipeline.

Modules are attached under the plan's own names, so `layers.3.mlp.linear_fc1.weight` is called that in every
layout.  Between layers the value travels in its wire form, plain tensors or tuples of them, because ZeRO-3's
hooks take outputs apart and cannot put named tuples together again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from model_providers.layer_plan import LayerPlan, PlannedLayer, Tie
from pretrain.engine.activation_offload import Offload

Wire = torch.Tensor | tuple[torch.Tensor, ...]


class BuiltLayer(NamedTuple):
    """A planned layer and its module on this rank."""

    plan: PlannedLayer
    module: nn.Module


Prepare = Callable[[str, nn.Module], None]


def build_layers(
    root: nn.Module,
    planned: Sequence[PlannedLayer],
    ties: Sequence[Tie] = (),
    prepare: Sequence[Prepare] = (),
) -> list[BuiltLayer]:
    """Build layers one by one and attach each to ``root`` under its dotted name.

    ``prepare`` steps (loading weights, sharding for ZeRO-3) see each layer as it is made, so that no rank ever
    holds more than one whole layer on top of what it keeps.
    """
    built = []
    for layer in planned:
        module = layer.build()
        attach(root, layer.name, module)
        share_tied_parameters(root, ties)
        for step in prepare:
            step(layer.name, module)
        built.append(BuiltLayer(layer, module))
    return built


def attach(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register ``module`` as ``root.a.b.c`` for the name ``"a.b.c"``, making plain modules on the way."""
    *parents, last = name.split(".")
    for word in parents:
        if word not in root._modules:
            root.add_module(word, nn.Module())
        root = root.get_submodule(word)
    root.add_module(last, module)


def share_tied_parameters(root: nn.Module, ties: Sequence[Tie]) -> None:
    """Make all ends of a tied parameter that are in ``root`` one Parameter."""
    names = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    for family in tied_families(ties):
        here = [f"{layer}.{parameter}" for layer, parameter in family if f"{layer}.{parameter}" in names]
        for name in here[1:]:
            module, _, parameter = name.rpartition(".")
            setattr(root.get_submodule(module), parameter, root.get_parameter(here[0]))


def tied_families(ties: Sequence[Tie]) -> list[list[tuple[str, str]]]:
    """(layer, parameter) of all that are one, the owner first."""
    families: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for tie in ties:
        owner = (tie.owner, tie.owner_parameter)
        families.setdefault(owner, [owner]).append((tie.user, tie.user_parameter))
    return list(families.values())


def tied_names(plan: LayerPlan) -> set[str]:
    """Names of the parameters that are tied to another layer's."""
    return {f"{tie.user}.{tie.user_parameter}" for tie in plan.ties}


def tied_to_embedding(plan: LayerPlan) -> set[str]:
    """Of these, the names of embeddings; a table of distances that layers share is a matrix of theirs."""
    return {f"{tie.user}.{tie.user_parameter}" for tie in plan.ties if tie.owner == "embedding"}


def run_layers(
    layers: Sequence[BuiltLayer], wire: Wire, plan: LayerPlan, offload: Offload | None = None
) -> Wire:
    """Apply layers in order; under full recompute, in groups that keep only their input.

    What the groups keep waits on the host with ``offload``; that of the embedding and the head is needed too soon.
    """
    before = None
    for group in checkpoint_groups(layers, plan):
        if offload is None or not torch.is_grad_enabled() or not group[0].plan.checkpointable:
            wire = _run_group(group, wire, plan)
            continue
        before = offload.group([layer.module for layer in group], before=before, inputs=_tensors(wire))
        with before:
            wire = _run_group(group, wire, plan)
    return wire


def _run_group(group: Sequence[BuiltLayer], wire: Wire, plan: LayerPlan) -> Wire:
    if _recomputes(group[0], plan):
        return plan.checkpoint_function(_apply(group), *_tensors(wire))  # type: ignore[no-any-return]
    return _apply(group)(wire)  # type: ignore[no-any-return]


def _tensors(wire: Wire) -> tuple[torch.Tensor, ...]:
    return (wire,) if isinstance(wire, torch.Tensor) else wire


def offload_of(plan: LayerPlan, device: torch.device) -> Offload | None:
    """Where the plan's layers put what they keep, if not in the device's memory."""
    above = plan.recompute.offload_above_bytes
    return None if above is None else Offload(device, above_bytes=above)


def run_to_loss(
    layers: Sequence[BuiltLayer],
    wire: Wire,
    plan: LayerPlan,
    targets: Sequence[torch.Tensor],
    offload: Offload | None = None,
) -> torch.Tensor:
    """Apply the plan's last layers, and the loss: a scalar, fp32."""
    if not plan.head_makes_loss:
        return plan.loss(run_layers(layers, wire, plan, offload), tuple(targets))
    *before, head = layers
    return head.module(run_layers(before, wire, plan, offload), *targets)


def checkpoint_groups(layers: Sequence[BuiltLayer], plan: LayerPlan) -> Iterator[list[BuiltLayer]]:
    """Layers one by one, but runs of up to ``recompute.every`` checkpointable ones together."""
    group: list[BuiltLayer] = []
    for layer in layers:
        if group and (not _recomputes(layer, plan) or len(group) == plan.recompute.every):
            yield group
            group = []
        if _recomputes(layer, plan):
            group.append(layer)
        else:
            yield [layer]
    if group:
        yield group


def _recomputes(layer: BuiltLayer, plan: LayerPlan) -> bool:
    return plan.recompute.mode == "full" and layer.plan.checkpointable and torch.is_grad_enabled()


def _apply(group: Sequence[BuiltLayer]) -> Any:
    def apply(*tensors: torch.Tensor) -> Wire:
        wire: Wire = tensors[0] if len(tensors) == 1 else tensors
        for layer in group:
            wire = layer.module(wire)
        return wire

    return apply
