"""A rank's share of a plan as DeepSpeed's pipeline module: one or several runs of layers."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from model_providers.layer_plan import LayerPlan
from model_providers.partial_gradients import sum_partial_gradients
from pretrain.engine.groups import Groups
from pretrain.engine.layers import (
    BuiltLayer,
    Prepare,
    Wire,
    build_layers,
    offload_of,
    run_layers,
    run_to_loss,
    tied_families,
)
from pretrain.engine.quiet import without_stdout
from pretrain.engine.schedules.ops import Placement
from pretrain.engine.schedules.streams import Mode


class PipelineShape(NamedTuple):
    """How a plan's layers lie on the stages, and in which order they work."""

    schedule: str  # a name of schedules.catalogue
    placement: Placement
    bounds: tuple[int, ...]  # first layer of each virtual stage, and the number of layers
    messages: Mode = "pair"
    hang_s: float = 0.0  # a rank tells what it waits for after so long; 0: never


class StageModule(PipelineModule):
    """This rank's chunks of a plan."""

    def __init__(
        self, plan: LayerPlan, groups: Groups, shape: PipelineShape, prepare: Sequence[Prepare] = ()
    ):
        layout, self.offload = groups.layout, offload_of(plan, groups.device)
        self.plan, self.shape, self.groups, self.prepare = plan, shape, groups, prepare
        topology = PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp)
        with without_stdout():  # DeepSpeed prints its partition; ours is in the banner
            super().__init__(layers=plan.layers, topology=topology, loss_fn=plan.loss)
        sum_partial_gradients(self, groups.tp)

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = list(self.shape.bounds)
        self._set_bounds(*self._range(0))

    def _range(self, chunk: int) -> tuple[int, int]:
        """The first layer of a chunk, and the one after its last."""
        virtual_stage = self.shape.placement.virtual_stage(self.stage_id, chunk)
        return self.parts[virtual_stage], self.parts[virtual_stage + 1]

    def _build(self) -> None:
        self.chunks: list[list[BuiltLayer]] = []
        for chunk in range(self.shape.placement.chunks):
            start, stop = self._range(chunk)
            here = self.plan.layers[start:stop]
            self.chunks.append(build_layers(self, here, self.plan.ties, self.prepare))
        self.built = [layer for chunk in self.chunks for layer in chunk]
        self.activate(0)
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def activate(self, chunk: int) -> None:
        """Make one chunk what `forward`, and DeepSpeed's checkpoints, are about."""
        self.active = self.chunks[chunk]
        self.forward_funcs = [layer.module for layer in self.active]
        self._set_bounds(*self._range(chunk))

    def stage_owner(self, layer_idx: int) -> int:
        """The pipeline rank that holds a layer."""
        virtual_stage = next(i for i in range(len(self.parts) - 1) if layer_idx < self.parts[i + 1])
        return self.shape.placement.rank(virtual_stage)

    def _index_tied_modules(self) -> dict[str, Any]:
        """Groups of ranks that hold the same tied parameter; the copy on the lowest rank counts in norms."""
        self.replicas: list[tuple[torch.nn.Parameter, dist.ProcessGroup]] = []
        for family in tied_families(self.plan.ties):
            holders: dict[
                int, str
            ] = {}  # by stage, the name of one of its ends there: they are one parameter
            for layer, parameter in family:
                holders.setdefault(self._stage_of(layer), f"{layer}.{parameter}")
            if len(holders) == 1:
                continue
            group = self._group_over_stages(list(holders))
            if self.stage_id in holders:
                replica = self.get_parameter(holders[self.stage_id])
                replica.ds_pipe_replicated = self.stage_id != min(holders)
                self.replicas.append((replica, group))
        return {}

    def _synchronize_tied_weights(self) -> None:
        for parameter, group in self.replicas:
            dist.broadcast(parameter.data, src=min(dist.get_process_group_ranks(group)), group=group)

    def get_tied_weights_and_groups(self) -> list[tuple[torch.nn.Parameter, dist.ProcessGroup]]:
        return self.replicas

    def forward(self, inputs: Wire, *targets: torch.Tensor) -> Wire:
        """Token ids or activations in, activations or logits [s b v/tp] out, or with targets the loss; of the active
        chunk.
        """
        if targets:
            return run_to_loss(self.active, inputs, self.plan, targets, self.offload)
        return run_layers(self.active, inputs, self.plan, self.offload)

    def save_state_dict(self, *arguments: Any, **named: Any) -> None:
        for _ in self._each_chunk():
            super().save_state_dict(*arguments, **named)

    def load_state_dir(self, *arguments: Any, **named: Any) -> None:
        for _ in self._each_chunk():
            super().load_state_dir(*arguments, **named)

    def _each_chunk(self) -> Iterator[None]:
        for chunk in range(len(self.chunks)):
            self.activate(chunk)
            yield
        self.activate(0)

    def _stage_of(self, layer_name: str) -> int:
        return self.stage_owner([layer.name for layer in self.plan.layers].index(layer_name))

    def _group_over_stages(self, stages: Sequence[int]) -> dist.ProcessGroup:
        """Every rank must make every group; the one that holds this rank's tensor and data coordinates is ours."""
        ours, layout = None, self.groups.layout
        for dp in range(layout.dp):
            for tp in range(layout.tp):
                group = dist.new_group([layout.rank(tp=tp, dp=dp, pp=stage) for stage in sorted(stages)])
                if (tp, dp) == (self.groups.place.tp, self.groups.place.dp):
                    ours = group
        assert ours is not None
        return ours
