"""What the training loop asks of an engine, and what both engines do alike: learning rate, records, state.

`zero.py` runs a whole model per rank under ZeRO 0 to 3; `pipeline.py` runs a stage.  The loop cannot tell them
apart.  An engine that meets a gradient which is not finite leaves the weights as they are and says so.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from model_providers.layer_plan import LayerPlan
from pretrain.engine import swapped_states, twin_flow
from pretrain.engine.cpu_adam import replay_products
from pretrain.engine.groups import Groups
from pretrain.engine.layers import BuiltLayer
from pretrain.engine.plain_loads import plain_data_only
from pretrain.engine.step_control import StepControl
from pretrain.monitor.timers import PhaseTimers

log = logging.getLogger(__name__)

EIGHT_BITS = "eight_bits"  # in DeepSpeed's files, beside the weights
# Of a group of parameters: torch takes them from a checkpoint, where a run file may say otherwise by now.
SETTINGS = {"betas", "eps", "weight_decay", "momentum", "alpha", "d", "beta2_decay", "update_gap", "scale"}


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank, on its device."""

    inputs: (
        torch.Tensor | tuple[torch.Tensor, ...]
    )  # the plan's inputs in wire form: token ids int64 [b s], maybe segments
    targets: tuple[torch.Tensor, ...]  # labels int64 [b s], weights float32 [b s]; those of a second task


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    loss: float  # mean over the global batch
    grad_norm: float  # of the whole model, before clipping
    applied: bool  # false: gradients were not finite and the weights are as before
    loss_scale: float  # 1.0 without fp16


class Engine(ABC):
    """A layer plan in motion under DeepSpeed."""

    def __init__(self, engine: StepControl, groups: Groups):
        self.deepspeed = engine
        self.groups = groups
        self.timers = PhaseTimers(groups.device)
        self._is_divided = twin_flow.is_divided(engine)
        self._peak_lrs = [group["lr"] for group in engine.optimizer.param_groups]
        if self._is_divided:
            self.before_step(lambda: twin_flow.follow_settings(engine))

    @abstractmethod
    def train_step(self, batches: Sequence[MicroBatch | None]) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step."""

    @abstractmethod
    def eval_step(self, batches: Sequence[MicroBatch | None], *, micro_size: int) -> float:
        """Mean loss over micro-batches of ``micro_size`` samples, without gradients; every rank gets it."""

    @property
    def module(self) -> torch.nn.Module:
        """This rank's layers, under their canonical names."""
        return self.deepspeed.module

    @property
    def plan(self) -> LayerPlan:
        """The whole model's."""
        return cast(Any, self.deepspeed.module).plan

    @property
    def layers(self) -> list[BuiltLayer]:
        """The layers that this rank holds, in order."""
        return cast(Any, self.deepspeed.module).built

    def set_learning_rate_factor(self, factor: float) -> float:
        """Every group's learning rate becomes its peak times ``factor``; returns the first group's."""
        for group, peak in zip(self.deepspeed.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * factor
        return self.learning_rate

    @property
    def learning_rate(self) -> float:
        return float(self.deepspeed.optimizer.param_groups[0]["lr"])

    def tie_drift(self) -> float:
        """Largest difference between the copies of any tied weight over pipeline stages; collective, 0.0 if none."""
        return 0.0

    def before_step(self, look: Callable[[], None]) -> None:
        """Call ``look`` after each gradient reduction, before clipping and the optimizer's step."""
        self.deepspeed.before_step_callbacks.append(look)

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """DeepSpeed's own files of this rank under ``folder``; every rank must call it."""
        told = {**client_state, EIGHT_BITS: self.deepspeed.eight_bits.state()}
        with self.deepspeed.in_plain_files():
            self.deepspeed.save_checkpoint(
                str(folder.parent), tag=folder.name, client_state=told, save_latest=False
            )
        if swapped_states.are_swapped(self.deepspeed):
            swapped_states.save(self.deepspeed, folder)
        if self._is_divided:
            twin_flow.save(self.deepspeed, folder)

    def load(self, folder: Path) -> None:
        """What `save` wrote under the same layout; scales of another recipe are left, and begin anew."""
        are_swapped = swapped_states.are_swapped(self.deepspeed)
        if are_swapped:
            swapped_states.make_known(self.deepspeed, folder)
        settings = [
            {key: value for key, value in group.items() if key in SETTINGS}
            for group in self.deepspeed.optimizer.param_groups
        ]
        with self.deepspeed.in_plain_files(), plain_data_only(folder.parent):
            path, told = self.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        assert path is not None, f"DeepSpeed found nothing to load under {folder}"
        if hasattr(self.deepspeed.optimizer, "clip_grad"):
            # DeepSpeed's optimizers take it from the checkpoint (zero/stage_1_and_2.py, bf16_optimizer.py, fp16/).
            self.deepspeed.optimizer.clip_grad = self.deepspeed.gradient_clipping()
        for group, stated in zip(self.deepspeed.optimizer.param_groups, settings, strict=True):
            group.update(stated)
        unknown = self.deepspeed.eight_bits.restore(told.get(EIGHT_BITS, {}))
        if unknown and self.groups.is_first:
            log.info("the checkpoint knows no FP8 scales of %d linears, which begin anew", len(unknown))
        if are_swapped:
            swapped_states.restore(self.deepspeed, folder)
        if self._is_divided:
            twin_flow.load(self.deepspeed, folder)
        replay_products(self.deepspeed.basic_optimizer)

    def _result(self, loss: float) -> StepResult:
        norm = self.deepspeed.get_global_grad_norm()
        return StepResult(
            loss=loss,
            grad_norm=float("nan") if norm is None else float(norm),
            applied=self.deepspeed.was_step_applied(),
            loss_scale=self._loss_scale(),
        )

    def _loss_scale(self) -> float:
        scale = self.deepspeed._get_optimizer_loss_scale() if self.deepspeed.fp16_enabled() else None
        return 1.0 if scale is None else float(scale)
