"""Training in a pipeline: each rank holds one or several runs of layers, and works off a plan that was checked.

`StageModule` (stage_module.py) and `StageEngine` extend DeepSpeed's module and engine by subclass, with a table of
instructions of their own: any schedule of `schedules/` runs on the same hundred lines.  What they mend, each with a
test: partition by our own costs with no empty stage; weights under the plan's names, equal whatever the number of
stages or chunks; one backward pass for all of a stage's outputs; tied parameters reduced in whichever attribute the
optimizer keeps their gradient; evaluation with another micro-batch size.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from model_providers import weight_gradients
from model_providers.layer_plan import LayerPlan
from pretrain.config import OptimizerConfig
from pretrain.engine.base import Engine, MicroBatch, StepResult
from pretrain.engine.experts import ExpertMarks
from pretrain.engine.groups import Groups, assert_same_ranks
from pretrain.engine.layers import Prepare, Wire
from pretrain.engine.messages import (
    Arrival,
    Mailbox,
    Shape,
    as_list,
    as_wire,
    shapes_of,
    with_gradient,
)
from pretrain.engine.schedules.catalogue import FORWARD_ONLY, SCHEDULES
from pretrain.engine.schedules.check import check
from pretrain.engine.schedules.ops import Kind, Op, Placement
from pretrain.engine.schedules.transfers import Message, Plan, Receive, Send, batches, lower
from pretrain.engine.stage_gradients import StageGradients
from pretrain.engine.stage_module import PipelineShape, StageModule
from pretrain.engine.step_control import StepControl
from pretrain.engine.waiting import WaitWatch
from pretrain.monitor.timers import PhaseTimers


@dataclass
class Slot:
    """What one micro-batch leaves in one chunk from one operation to the next."""

    inputs: Wire | None = None
    outputs: Wire | None = None
    loss: torch.Tensor | None = None  # of the last virtual stage
    arrival: Arrival | None = None  # activations under way
    gradients: Arrival | None = None  # of the outputs, under way or handed over
    waiting: weight_gradients.Store = field(default_factory=weight_gradients.Store)


class _BaseIsMade(DeepSpeedEngine):
    """Marks the moment between DeepSpeed's two constructors, standing behind `PipelineEngine` in the order of bases."""

    is_base_made = False

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.is_base_made = True


class StageEngine(StepControl, StageGradients, PipelineEngine, _BaseIsMade):
    """DeepSpeed's pipeline engine, working off a plan of ours."""

    phase_timers: PhaseTimers
    _placement: Placement | None = None  # DeepSpeed asks for stages while it is made, before there are chunks
    _active_chunk: int | None = None

    def zero_optimization_stage(self) -> int:
        """DeepSpeed's pipeline engine refuses ZeRO-2 when it is made, for want of what `_backward` does at its end."""
        stage = int(super().zero_optimization_stage())
        is_asked_by_that_check = self.is_base_made and self._placement is None
        return min(stage, 1) if is_asked_by_that_check else stage

    def begin(self, groups: Groups, shape: PipelineShape) -> None:
        """What the first step needs; once, after construction, on every rank."""
        self._groups, self._shape, self._placement = groups, shape, shape.placement
        self._plans: dict[tuple[str, int], Plan] = {}
        # What a virtual stage takes, by micro-batch size and whether it is trained: layers that look ahead take more.
        self._shapes: dict[tuple[int, int, bool], list[Shape]] = {}
        self._slots: dict[tuple[int, int], Slot] = defaultdict(Slot)
        self._mailbox = Mailbox(groups.pp, stage=self.stage_id, mode=shape.messages, device=groups.device)
        if shape.messages == "channel":
            self._mailbox.open_channels(groups.layout.groups("pp"))
        self._watch = WaitWatch(f"rank {groups.rank}, stage {self.stage_id}", shape.hang_s)
        self.begin_gradients(groups)

    def run_training(self, batches: Sequence[MicroBatch | None], micro_size: int) -> float:
        """One optimizer step; the mean loss, on every rank."""
        self.module.train()
        self.begin_step(len(batches))
        self.before_passes()
        self._run(self._plan(self._shape.schedule, len(batches)), batches, micro_size)
        with self._telling("the optimizer's step"), self.phase_timers.phase("step"):
            self.after_passes()
            self._exec_optimizer_step()
        return float(self._aggregate_total_loss())

    @torch.no_grad()
    def run_evaluation(self, batches: Sequence[MicroBatch | None], micro_size: int) -> float:
        """The mean loss, on every rank."""
        self.module.eval()
        self._run(self._plan("forward", len(batches)), batches, micro_size)
        mean = None
        if self.is_last_stage():
            mean = self._reduce_outputs([self.total_loss], micro_batches=len(batches))
        return float(self._bcast_pipe_scalar(mean))

    def _plan(self, name: str, num_micro_batches: int) -> Plan:
        """Made and checked once for each number of micro-batches."""
        key = (name, num_micro_batches)
        if key not in self._plans:
            family = FORWARD_ONLY if name == "forward" else SCHEDULES[name]
            self._plans[key] = lower(family.make(self._shape.placement, num_micro_batches))
            check(self._plans[key])
        return self._plans[key]

    def _run(self, plan: Plan, batches_: Sequence[MicroBatch | None], micro_size: int) -> None:
        self._batches, self._micro_size, self.total_loss = batches_, micro_size, None
        splits = plan.schedule.splits_backward and torch.is_grad_enabled()
        finished = self.finished if torch.is_grad_enabled() else None
        if finished is not None:
            finished.begin(plan.schedule.orders[self.stage_id])
        with weight_gradients.may_wait() if splits else nullcontext():
            for step in batches(plan.programs[self.stage_id]):
                if isinstance(step, Op):
                    self._groups.begin_micro_batch(step.micro_batch)
                    with self._telling(
                        f"the {NAMES[step.kind]} of micro-batch {step.micro_batch}, chunk {step.chunk}"
                    ):
                        self._TABLE[step.kind](self, step)
                    if finished is not None:
                        finished.count(step)
                else:
                    with self._telling("its messages"), self.phase_timers.phase("pipeline"):
                        self._post(step)
        with self._telling("its last messages"), self.phase_timers.phase("pipeline"):
            self._mailbox.all_sent()
        self._slots.clear()
        self._batches = ()

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """A failure inside is told at once with its place: the others will only say that a rank is gone."""
        try:
            yield
        except Exception as failure:
            place = (
                f"rank {self._groups.rank}, stage {self.stage_id}, step {self.global_steps + 1}, in {what}"
            )
            print(f"{place}: {type(failure).__name__}: {failure}", file=sys.stderr, flush=True)
            failure.add_note(place)
            raise

    # ---- operations

    def _forward(self, op: Op) -> None:
        slot, stage = self._slot(op), self._stage(op)
        if stage == 0:
            batch = self._batches[op.micro_batch]
            assert batch is not None, "the first stage reads the data"
            slot.inputs = batch.inputs
        elif slot.arrival is not None:
            with self.phase_timers.phase("pipeline"), self._waiting(op, "activation", stage - 1):
                slot.inputs, slot.arrival = as_wire(slot.arrival.wait()), None
        is_last = stage == self._shape.placement.last
        with self.phase_timers.phase("forward"), self._chunk(op.chunk):
            targets = self._targets(op) if is_last else ()
            outputs: Any = DeepSpeedEngine.forward(self, slot.inputs, *targets)
            if is_last:
                self._note_loss(slot, outputs)
            else:
                slot.outputs = outputs
        neighbour = self._neighbour(op, stage + 1)
        if neighbour is not None:
            is_training = torch.is_grad_enabled()
            moved = [
                tensor.detach().requires_grad_(is_training and tensor.is_floating_point())
                for tensor in as_list(outputs)
            ]
            neighbour.inputs = as_wire(moved)
        if not torch.is_grad_enabled():
            slot.inputs = None
            slot.outputs = None if neighbour is not None else slot.outputs

    def _targets(self, op: Op) -> tuple[torch.Tensor, ...]:
        batch = self._batches[op.micro_batch]
        assert batch is not None, "the last stage reads the data"
        return batch.targets

    def _note_loss(self, slot: Slot, loss: Any) -> None:
        self.total_loss = (
            loss.detach().clone() if self.total_loss is None else self.total_loss + loss.detach()
        )
        slot.loss = loss if torch.is_grad_enabled() else None

    def _backward(self, op: Op) -> None:
        """Both halves, or the first: what the linears put aside stays in the slot."""
        slot, stage = self._slot(op), self._stage(op)
        gradients = None
        if stage != self._shape.placement.last:
            assert slot.gradients is not None, "the gradients of the outputs were asked for"
            with self.phase_timers.phase("pipeline"), self._waiting(op, "gradient", stage + 1):
                gradients, slot.gradients = slot.gradients.wait(), None
        with self.phase_timers.phase("backward"), self._chunk(op.chunk):
            if gradients is None:
                loss, slot.loss = slot.loss, None
                DeepSpeedEngine.backward(self, loss)
            else:
                assert slot.outputs is not None
                self._backward_from(as_list(slot.outputs), gradients)
                slot.outputs = None
            self.after_backward(op.chunk)
        neighbour = self._neighbour(op, stage - 1)
        if neighbour is not None:
            neighbour.gradients = Arrival(self._input_gradients(slot))
        if stage == 0 or neighbour is not None:
            slot.inputs = None

    def _backward_from(self, outputs: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        """One pass for all outputs: DeepSpeed's one per output walks the shared graph again and again."""
        ends = [
            (output, gradient)
            for output, gradient in zip(with_gradient(outputs), gradients, strict=True)
            if output.requires_grad
        ]
        assert ends, "no output of this stage needs a gradient, but it has weights to train"
        if self.using_bf16_optimizer:
            self.optimizer.clear_lp_grads()
        self._running_engine_backward = True  # DeepSpeed's hooks ask whether it is the engine that runs
        try:
            torch.autograd.backward([output for output, _ in ends], [gradient for _, gradient in ends])
        finally:
            self._running_engine_backward = False
        if self.using_bf16_optimizer and not self._config.bfloat16_config.immediate_grad_update:
            self.optimizer.update_hp_grads(clear_lp_grads=False)

    def _backward_of_inputs(self, op: Op) -> None:
        with weight_gradients.put_aside() as store:
            self._backward(op)
        self._slot(op).waiting = store

    def _backward_of_weights(self, op: Op) -> None:
        with self.phase_timers.phase("backward"):
            self._slot(op).waiting.compute(self.accumulate)

    _TABLE: ClassVar[dict[Kind, Callable[..., None]]] = {
        Kind.FORWARD: _forward,
        Kind.BACKWARD: _backward,
        Kind.INPUT: _backward_of_inputs,
        Kind.WEIGHT: _backward_of_weights,
    }

    # ---- messages

    def _post(self, messages: Sequence[Message]) -> None:
        """All together, but for shapes that must be told on the way."""
        ready: list[tuple[Message, list[torch.Tensor]]] = []
        for message in messages:
            if message.what == "activation" and self._receiving_stage(message) not in self._known_shapes():
                self._start(ready)
                ready = []
                self._exchange_shapes(message)
            ready.append((message, self._tensors_of(message)))
        self._start(ready)
        self._mailbox.forget_sent()

    def _start(self, ready: list[tuple[Message, list[torch.Tensor]]]) -> None:
        works = self._mailbox.post(ready) if ready else {}
        for message, tensors in ready:
            if isinstance(message, Receive):
                arrival = Arrival(tensors, works[message.number])
                slot = self._slot(message)
                if message.what == "activation":
                    slot.arrival = arrival
                else:
                    slot.gradients = arrival

    def _tensors_of(self, message: Message) -> list[torch.Tensor]:
        slot = self._slot(message)
        if isinstance(message, Send):
            if message.what == "gradient":
                gradients, slot.inputs = self._input_gradients(slot), None
                return gradients
            assert slot.outputs is not None
            tensors = as_list(slot.outputs)
            if not torch.is_grad_enabled():
                slot.outputs = None
            return tensors
        if message.what == "gradient":
            assert slot.outputs is not None
            return [torch.empty_like(tensor.detach()) for tensor in with_gradient(as_list(slot.outputs))]
        shapes = self._shapes[self._receiving_stage(message), *self._kind_of_pass()]
        is_training = torch.is_grad_enabled()
        return [
            torch.empty(size, dtype=dtype, device=self.device).requires_grad_(
                is_training and dtype.is_floating_point
            )
            for size, dtype in shapes
        ]

    def _kind_of_pass(self) -> tuple[int, bool]:
        return self._micro_size, torch.is_grad_enabled()

    def _known_shapes(self) -> set[int]:
        return {stage for stage, *kind in self._shapes if tuple(kind) == self._kind_of_pass()}

    def _exchange_shapes(self, message: Message) -> None:
        stage = self._receiving_stage(message)
        if isinstance(message, Send):
            outputs = self._slot(message).outputs
            assert outputs is not None
            shapes = shapes_of(as_list(outputs))
            self._mailbox.tell_shapes(shapes, message.peer)
        else:
            with self._waiting(message, "activation", stage - 1):
                shapes = self._mailbox.hear_shapes(message.peer)
        self._shapes[stage, *self._kind_of_pass()] = shapes

    def _receiving_stage(self, message: Message) -> int:
        """The virtual stage that an activation is for."""
        here = self._shape.placement.virtual_stage(self.stage_id, message.chunk)
        return here + 1 if isinstance(message, Send) else here

    def _input_gradients(self, slot: Slot) -> list[torch.Tensor]:
        assert slot.inputs is not None
        floating = with_gradient(as_list(slot.inputs))
        return [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in floating]

    def _waiting(self, at: Op | Message, what: str, virtual_stage: int) -> AbstractContextManager[None]:
        source, step = self._shape.placement.rank(virtual_stage), self.global_steps + 1
        awaited = f"{what} of micro-batch {at.micro_batch} from stage {source}"
        self.phase_timers.heartbeat.doing(f"waits for {awaited}")
        return self._watch.waiting_for(f"{awaited}, step {step}")

    # ---- places

    def _slot(self, at: Op | Message) -> Slot:
        return self._slots[at.chunk, at.micro_batch]

    def _stage(self, op: Op) -> int:
        return self._shape.placement.virtual_stage(self.stage_id, op.chunk)

    def _neighbour(self, op: Op, stage: int) -> Slot | None:
        """The same micro-batch's slot in an adjoining virtual stage, if that lives on this rank too."""
        placement = self._shape.placement
        if not 0 <= stage <= placement.last or placement.rank(stage) != self.stage_id:
            return None
        return self._slots[placement.chunk(stage), op.micro_batch]

    @contextmanager
    def _chunk(self, chunk: int) -> Iterator[None]:
        """Questions of DeepSpeed's about first and last stages are about this chunk inside."""
        self._active_chunk = chunk
        self.module.activate(chunk)
        try:
            yield
        finally:
            self._active_chunk = None

    def is_first_stage(self) -> bool:
        """Of the active chunk, else of the rank."""
        if self._placement is None or self._active_chunk is None:
            return self.stage_id == 0
        return self._placement.virtual_stage(self.stage_id, self._active_chunk) == 0

    def is_last_stage(self) -> bool:
        """Whether the active chunk, else any of the rank's, computes the loss."""
        if self._placement is None:
            return self.stage_id == self.num_stages - 1
        if self._active_chunk is None:
            return self.stage_id == self._placement.rank(self._placement.last)
        return self._placement.virtual_stage(self.stage_id, self._active_chunk) == self._placement.last

    def _loss_stage_global_rank(self) -> int:
        assert self._placement is not None
        return self.grid.stage_to_global(self._placement.rank(self._placement.last))


NAMES = {
    Kind.FORWARD: "forward pass",
    Kind.BACKWARD: "backward pass",
    Kind.INPUT: "backward pass of the inputs",
    Kind.WEIGHT: "backward pass of the weights",
}


class PipelineTrainer(Engine):
    """One rank of a pipeline, driven in step with the others."""

    def __init__(self, engine: StageEngine, groups: Groups):
        super().__init__(engine, groups)
        engine.phase_timers = self.timers

    def train_step(self, batches: Sequence[MicroBatch | None]) -> StepResult:
        assert len(batches) == self.deepspeed.micro_batches
        return self._result(self.deepspeed.run_training(batches, self.deepspeed.micro_batch_size))

    def tie_drift(self) -> float:
        largest = torch.zeros((), device=self.groups.device)
        for parameter, group in self.deepspeed.module.get_tied_weights_and_groups():
            copies = [torch.empty_like(parameter) for _ in range(dist.get_world_size(group))]
            dist.all_gather(copies, parameter.detach().contiguous(), group=group)
            for other in copies[1:]:
                largest = torch.maximum(largest, (copies[0].float() - other.float()).abs().max())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def eval_step(self, batches: Sequence[MicroBatch | None], *, micro_size: int) -> float:
        return self.deepspeed.run_evaluation(batches, micro_size)


def build_pipeline_engine(
    plan: LayerPlan,
    groups: Groups,
    shape: PipelineShape,
    *,
    json: dict[str, Any],
    optimizer: OptimizerConfig,
    prepare: Sequence[Prepare] = (),
) -> PipelineTrainer:
    """Build this rank's layers and put our pipeline engine around them."""
    steps = list(prepare)
    if groups.layout.ep > 1:
        steps.append(ExpertMarks(groups, json["zero_optimization"]["stage"]))
    module = StageModule(plan, groups, shape, steps)
    grid = module.mpu()
    assert_same_ranks("dp", grid.get_data_parallel_group(), dist.get_process_group_ranks(groups.dp))
    assert_same_ranks("pp", grid.get_pipe_parallel_group(), dist.get_process_group_ranks(groups.pp))
    engine = StageEngine.around(module, groups, grid, json=json, optimizer=optimizer)
    engine.begin(groups, shape)
    return PipelineTrainer(engine, groups)
