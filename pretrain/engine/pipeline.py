"""Training in a pipeline: each rank holds a run of layers, DeepSpeed's 1F1B moves activations between them.

`StageModule` and `OneStage` extend DeepSpeed's module and engine by subclass.  What they mend, each with a test:
partition by our own costs with no empty stage; weights under the plan's names, equal whatever the number of
stages; tied parameters reduced in whichever attribute the optimizer keeps their gradient; evaluation with
another micro-batch size.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from model_providers.layer_plan import LayerPlan
from model_providers.partial_gradients import sum_partial_gradients
from pretrain.config import OptimizerConfig
from pretrain.engine.base import Engine, MicroBatch, StepResult
from pretrain.engine.groups import Groups, assert_same_ranks
from pretrain.engine.layers import Prepare, Wire, build_layers, run_layers
from pretrain.engine.quiet import without_stdout
from pretrain.engine.step_control import StepControl
from pretrain.monitor.timers import PhaseTimers

Bounds = Sequence[int]  # first layer of each stage, and the number of layers


class StageModule(PipelineModule):
    """This rank's share of a plan."""

    def __init__(self, plan: LayerPlan, groups: Groups, bounds: Bounds, prepare: Sequence[Prepare] = ()):
        layout = groups.layout
        self.plan, self.bounds, self.groups, self.prepare = plan, list(bounds), groups, prepare
        topology = PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp)
        with without_stdout():  # DeepSpeed prints its partition; ours is in the banner
            super().__init__(layers=plan.layers, topology=topology, loss_fn=plan.loss)
        sum_partial_gradients(self, groups.tp)

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = self.bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _build(self) -> None:
        here = self.plan.layers[self._local_start : self._local_stop]
        self.built = build_layers(self, here, self.plan.ties, self.prepare)
        self.forward_funcs = [layer.module for layer in self.built]
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def _index_tied_modules(self) -> dict[str, Any]:
        """Groups of ranks that hold the same tied parameter; the earliest stage's copy counts in norms."""
        self.replicas: list[tuple[torch.nn.Parameter, dist.ProcessGroup]] = []
        for tie in self.plan.ties:
            stages = [self._stage_of(tie.owner), self._stage_of(tie.user)]
            if stages[0] == stages[1]:
                continue
            group = self._group_over_stages(stages)
            mine = {
                stages[0]: f"{tie.owner}.{tie.owner_parameter}",
                stages[1]: f"{tie.user}.{tie.user_parameter}",
            }
            if self.stage_id in mine:
                parameter = self.get_parameter(mine[self.stage_id])
                parameter.ds_pipe_replicated = self.stage_id != min(stages)
                self.replicas.append((parameter, group))
        return {}

    def _synchronize_tied_weights(self) -> None:
        for parameter, group in self.replicas:
            dist.broadcast(parameter.data, src=min(dist.get_process_group_ranks(group)), group=group)

    def get_tied_weights_and_groups(self) -> list[tuple[torch.nn.Parameter, dist.ProcessGroup]]:
        return self.replicas

    def forward(self, inputs: Wire) -> Wire:
        """Token ids or activations in, activations or logits [s b v/tp] out."""
        return run_layers(self.built, inputs, self.plan)

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


class OneStage(StepControl, PipelineEngine):
    """DeepSpeed's pipeline engine with our own table of instructions."""

    phase_timers: PhaseTimers

    def _timed(self, name: str, instruction: Any, **arguments: Any) -> None:
        with self.phase_timers.phase(name):
            instruction(self, **arguments)

    def _reduce_tied_gradients(self) -> None:
        """Sum tied gradients over their stages, wherever the optimizer keeps them.

        DeepSpeed 0.19 looks at ``weight.grad`` and skips the sum in silence when it is None, which unties the
        weights under bf16, fp32 accumulation and CPU offload.
        """
        for parameter, group in self.module.get_tied_weights_and_groups():
            gradient = self._tied_gradient(parameter)
            assert gradient is not None, "a tied parameter has no gradient on this stage"
            dist.all_reduce(gradient, group=group)

    def _tied_gradient(self, parameter: Any) -> torch.Tensor | None:
        if self.using_bf16_optimizer:
            return parameter._hp_grad
        if getattr(self.optimizer, "use_grad_accum_attribute", False):
            return parameter.grad_accum
        return parameter.grad

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.ReduceTiedGrads: _reduce_tied_gradients,
    }


def _with_timers(table: dict[type, Any]) -> dict[type, Any]:
    phases = {
        schedule.LoadMicroBatch: "load",
        schedule.ForwardPass: "forward",
        schedule.BackwardPass: "backward",
        schedule.SendActivation: "pipeline",
        schedule.RecvActivation: "pipeline",
        schedule.SendGrad: "pipeline",
        schedule.RecvGrad: "pipeline",
        schedule.ReduceTiedGrads: "step",
        schedule.ReduceGrads: "step",
        schedule.OptimizerStep: "step",
    }

    def timed(name: str, instruction: Any) -> Any:
        return lambda engine, **arguments: engine._timed(name, instruction, **arguments)

    return {kind: timed(phases[kind], instruction) for kind, instruction in table.items()}


OneStage._INSTRUCTION_MAP = _with_timers(OneStage._INSTRUCTION_MAP)


class PipelineTrainer(Engine):
    """One stage of a pipeline, driven in step with the others."""

    def __init__(self, engine: OneStage, groups: Groups):
        super().__init__(engine, groups)
        engine.phase_timers = self.timers
        self._micro_size = engine.micro_batch_size

    def train_step(self, batches: Sequence[MicroBatch | None]) -> StepResult:
        assert len(batches) == self.deepspeed.micro_batches
        self._expect_micro_size(self.deepspeed.micro_batch_size)
        loss = self.deepspeed.train_batch(_as_deepspeed_reads(batches))
        return self._result(float(loss))

    @torch.no_grad()
    def eval_step(self, batches: Sequence[MicroBatch | None], *, micro_size: int) -> float:
        self._expect_micro_size(micro_size)
        loss = self.deepspeed.eval_batch(_as_deepspeed_reads(batches), num_micro_batches=len(batches))
        return float(loss)

    def _expect_micro_size(self, micro_size: int) -> None:
        """DeepSpeed tells shapes once; told again when they change, or a rank dies in the middle of a receive."""
        if micro_size != self._micro_size:
            self.deepspeed.reset_activation_shape()
            self._micro_size = micro_size


def build_pipeline_engine(
    plan: LayerPlan,
    groups: Groups,
    bounds: Bounds,
    *,
    json: dict[str, Any],
    optimizer: OptimizerConfig,
    prepare: Sequence[Prepare] = (),
) -> PipelineTrainer:
    """Build this stage's layers and put our pipeline engine around them."""
    module = StageModule(plan, groups, bounds, prepare)
    grid = module.mpu()
    assert_same_ranks("dp", grid.get_data_parallel_group(), dist.get_process_group_ranks(groups.dp))
    assert_same_ranks("pp", grid.get_pipe_parallel_group(), dist.get_process_group_ranks(groups.pp))
    return PipelineTrainer(OneStage.around(module, groups, grid, json=json, optimizer=optimizer), groups)


def _as_deepspeed_reads(batches: Sequence[MicroBatch | None]) -> Iterator[Any] | None:
    """(inputs, labels) per micro-batch on stages that read data; middle stages have none."""
    if batches[0] is None:
        return None
    return iter([(batch.inputs, batch.targets) for batch in batches if batch is not None])
