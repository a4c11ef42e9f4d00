"""Training under ZeRO 0 to 3, without a pipeline: every rank holds all layers (split over tp, sharded over dp)."""

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch

from model_providers.layer_plan import LayerPlan
from model_providers.partial_gradients import sum_partial_gradients
from pretrain.config import OptimizerConfig
from pretrain.ds_offload import offload_place
from pretrain.engine.base import Engine, MicroBatch, StepResult
from pretrain.engine.experts import ExpertMarks
from pretrain.engine.groups import Groups, ModelParallelUnit
from pretrain.engine.layers import Prepare, Wire, build_layers, offload_of, run_to_loss
from pretrain.engine.lean_heap import return_freed_memory
from pretrain.engine.step_control import StepControl


class LayerStack(torch.nn.Module):
    """All layers of a plan, and its loss: what the ZeRO engine trains."""

    def __init__(self, plan: LayerPlan, groups: Groups, prepare: Sequence[Prepare] = ()):
        super().__init__()
        self.plan = plan
        self.built = build_layers(self, plan.layers, plan.ties, prepare)
        self.offload = offload_of(plan, groups.device)
        sum_partial_gradients(self, groups.tp)

    def forward(self, inputs: Wire, *targets: torch.Tensor) -> torch.Tensor:
        """Token ids [b s] (or with segments), labels and weights [b s] -> the weighted sum of losses, a scalar."""
        return run_to_loss(self.built, inputs, self.plan, targets, self.offload)


class ZeroEngine(Engine):
    """A whole model per data-parallel rank, under DeepSpeed's plain engine."""

    def train_step(self, batches: Sequence[MicroBatch | None]) -> StepResult:
        engine = self.deepspeed
        engine.train()
        engine.begin_step(len(batches))
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for number, batch in enumerate(batches):
            assert batch is not None
            self.groups.begin_micro_batch(number)
            with self.timers.phase("forward"):
                loss = engine(batch.inputs, *batch.targets)
            with self.timers.phase("backward"):
                engine.backward(loss)
            total += loss.detach()
            with self.timers.phase("step"):
                engine.step()
        return self._result(self.groups.mean_over_dp(total.item() / len(batches)))

    @torch.no_grad()
    def eval_step(self, batches: Sequence[MicroBatch | None], *, micro_size: int) -> float:
        engine = self.deepspeed
        engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for batch in batches:
            assert batch is not None
            total += engine(batch.inputs, *batch.targets)
        return self.groups.mean_over_dp(total.item() / len(batches))


def build_zero_engine(
    plan: LayerPlan,
    groups: Groups,
    *,
    json: dict[str, Any],
    optimizer: OptimizerConfig,
    prepare: Sequence[Prepare] = (),
) -> ZeroEngine:
    """Build all of the plan's layers (sharded one by one under ZeRO-3) and put DeepSpeed's engine around them."""
    mpu = ModelParallelUnit(groups)
    if "nvme" in (offload_place(json, "offload_optimizer"), offload_place(json, "offload_param")):
        return_freed_memory()
    steps = list(prepare)
    if groups.layout.ep > 1:
        steps.append(ExpertMarks(groups, json["zero_optimization"]["stage"]))
    if json["zero_optimization"]["stage"] == 3:
        steps.append(LayerSharder(json, groups, mpu))
    module = LayerStack(plan, groups, steps)
    return ZeroEngine(StepControl.around(module, groups, mpu, json=json, optimizer=optimizer), groups)


class LayerSharder:
    """ZeRO-3 from the start: splits each layer's parameters over the data-parallel ranks as soon as it is built.

    No dtype is passed to `zero.Init`: DeepSpeed 0.19 would turn fp32 into bf16 on CPU.
    """

    def __init__(self, json: dict[str, Any], groups: Groups, mpu: ModelParallelUnit):
        self._arguments = {"config_dict_or_path": json, "data_parallel_group": groups.dp, "mpu": mpu}
        self._swapper: Any = None  # one per process: each holds its own buffers and asynchronous I/O threads

    def __call__(self, name: str, module: torch.nn.Module) -> None:
        sharded = deepspeed.zero.Init(module=module, param_swapper=self._swapper, **self._arguments)
        self._swapper = sharded.param_swapper
