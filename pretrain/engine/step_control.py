"""What every optimizer step gets on top of DeepSpeed's: a right norm without ZeRO, and no step into NaN.

DeepSpeed 0.19 clips fp32 gradients without ZeRO by a norm that counts parameters of pipeline stage 0 only, and
reports none; its ZeRO optimizers do both well and skip a step whose norm is not finite.  This mixin brings the
plain case up to them: one norm that counts each logical parameter once over tp x pp.
"""

import glob
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine

from model_providers.router import Router
from pretrain.config import OptimizerConfig
from pretrain.engine import experts, swapped_states
from pretrain.engine.averaging import average, is_plain_average
from pretrain.engine.eight_bits import EightBits
from pretrain.engine.fillers import fill
from pretrain.engine.groups import Groups
from pretrain.engine.layers import tied_to_embedding
from pretrain.engine.optimizers import client_optimizer, set_flags, tell_partitions
from pretrain.engine.quiet import without_stdout
from pretrain.optim import parameter_groups

ROW = 1024  # elements whose squares are summed in fp32


class StepControl(DeepSpeedEngine):
    """For subclasses of `DeepSpeedEngine`, made by `around`."""

    model_group: dist.ProcessGroup | None = None
    tp_rank: int = 0
    routers: Sequence[Router] = ()
    routing_group: dist.ProcessGroup | None = None  # the ranks that route the tokens of this stage
    eight_bits: EightBits

    @classmethod
    def around(
        cls, module: Any, groups: Groups, mpu: Any, *, json: dict[str, Any], optimizer: OptimizerConfig
    ) -> Self:
        """This engine around a module that holds layers of ``module.plan``."""
        config = DeepSpeedConfig(json, mpu)
        set_flags(config, module)
        parameters = parameter_groups(module.named_parameters(), optimizer, tied_to_embedding(module.plan))
        if groups.layout.pp > 1:
            fill(module, parameters, groups, expert_group=experts.group_name(groups))
        if groups.layout.ep > 1 and json["zero_optimization"]["stage"] < 3:
            parameters = experts.optimizer_groups(parameters)
        with without_stdout():
            engine = cls(
                args=None,
                model=module,
                optimizer=client_optimizer(json, parameters, module, groups.device),
                model_parameters=parameters,
                mpu=mpu,
                config=json,
                config_class=config,
            )
        if groups.layout.ep > 1 and isinstance(engine.optimizer, BF16_Optimizer):
            experts.sum_norms_over_whole_copies(groups)
        tell_partitions(engine, groups)
        engine.model_group, engine.tp_rank = groups.model, groups.place.tp
        engine.routers, engine.routing_group = experts.routers(module), groups.experts.stage
        engine.eight_bits = EightBits(
            module,
            groups.experts.stage,
            groups.device,
            keeps_copies=json["zero_optimization"]["stage"] < 3,
        )
        if swapped_states.are_swapped(engine):
            swapped_states.release_as_it_steps(engine)
        engine.monitor.enabled = False  # records come from one writer, pretrain/monitor
        return engine

    @property
    def before_step_callbacks(self) -> list[Callable[[], None]]:
        """Called when gradients are reduced and nothing is clipped or stepped yet."""
        return self.__dict__.setdefault("_before_step_callbacks", [])

    def _configure_distributed_model(self, model: Any) -> None:
        """DeepSpeed looks for expert layers of its own; below ZeRO-3 its optimizers must hear of ours."""
        super()._configure_distributed_model(model)
        shared_out = [parameter for parameter in self.module.parameters() if is_moe_param(parameter)]
        self.has_moe_layers = bool(shared_out) and self.zero_optimization_stage() < 3

    def clip_fp32_gradients(self) -> None:
        """Done in `_take_model_step`, with the right norm."""

    def allreduce_no_retain(
        self,
        bucket: Sequence[torch.Tensor],
        dp_group: dist.ProcessGroup,
        numel_per_bucket: int = 500_000_000,
        dp_world_size: int | None = None,
    ) -> None:
        """Average gradients where they are: DeepSpeed copies all of them into new memory and back, for one rank too."""
        if is_plain_average(self) and all(one.dtype == self.communication_data_type for one in bucket):
            average(bucket, dp_group, dp_world_size or dist.get_world_size(dp_group))
        else:
            super().allreduce_no_retain(bucket, dp_group, numel_per_bucket, dp_world_size)

    def _get_all_ckpt_names(self, checkpoints_path: str, tag: str) -> Any:
        """DeepSpeed takes the path for a pattern, in which brackets mean something."""
        return super()._get_all_ckpt_names(glob.escape(checkpoints_path), tag)

    @contextmanager
    def in_plain_files(self) -> Iterator[None]:
        """Save and load every rank's state like any other: DeepSpeed's files for experts know its own layers only."""
        kept, self.has_moe_layers = self.has_moe_layers, False
        try:
            yield
        finally:
            self.has_moe_layers = kept

    def begin_step(self, num_micro_batches: int) -> None:
        """Before the first forward pass of an optimizer step."""
        self.eight_bits.begin_passes()
        if self.routers:
            scale = self._get_optimizer_loss_scale() if self.fp16_enabled() else None
            experts.begin_step(
                loss_scale=1.0 if scale is None else float(scale),
                num_micro_batches=num_micro_batches,
                device=self.device,
            )

    def _take_model_step(self, lr_kwargs: Any) -> None:
        for look in self.before_step_callbacks:
            look()
        self.eight_bits.end_passes()
        self._take_checked_step(lr_kwargs)
        self.eight_bits.end_step(applied=self.was_step_applied())
        for router in self.routers:
            router.end_step(self.routing_group, applied=self.was_step_applied())

    def _take_checked_step(self, lr_kwargs: Any) -> None:
        if self.zero_optimization() or self.fp16_enabled() or self.bfloat16_enabled():
            super()._take_model_step(lr_kwargs)
            return
        assert self.model_group is not None
        norm = global_norm(
            self.module.parameters(), tp_rank=self.tp_rank, model_group=self.model_group, device=self.device
        )
        self._global_grad_norm = norm
        if math.isfinite(norm):
            clip_by_norm(self.module.parameters(), norm=norm, limit=self.gradient_clipping())
            super()._take_model_step(lr_kwargs)
            self._global_grad_norm = norm
        else:
            self._skip_step()

    def _skip_step(self) -> None:
        self.zero_grad()
        self._step_applied = False
        self.skipped_steps += 1
        self.global_steps += 1
        self.global_samples += self.train_batch_size()


def global_norm(
    parameters: Iterable[torch.nn.Parameter],
    *,
    tp_rank: int,
    model_group: dist.ProcessGroup,
    device: torch.device,
) -> float:
    """L2 norm of the gradients of one whole model copy, each logical parameter counted once.

    A parameter that is not split over tensor ranks counts on tensor rank 0; a tied replica on a later pipeline
    stage (``ds_pipe_replicated``) does not count.
    """
    counted = [
        parameter.grad
        for parameter in parameters
        if parameter.grad is not None
        and (tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False))
        and not getattr(parameter, "ds_pipe_replicated", False)
    ]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in counted:
        total += sum_of_squares(gradient)
    dist.all_reduce(total, group=model_group)
    return math.sqrt(total.item()) if math.isfinite(total.item()) else float("nan")


def sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """In fp64 over rows that are summed in fp32.

    torch's fp32 norm of a million elements is off by 1e-5 on CPU; this is off by 1e-9 at a sixteenth of the cost
    of a norm in fp64.
    """
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=torch.float32)
    return rows.double().square().sum() + flat[whole:].double().square().sum()


def clip_by_norm(parameters: Iterable[torch.nn.Parameter], *, norm: float, limit: float) -> None:
    """Scale gradients in place so that their norm is at most ``limit``; 0 means no limit.

    The small constant is torch.nn.utils.clip_grad_norm_'s and DeepSpeed's, so that all engines clip alike.
    """
    factor = limit / (norm + 1e-6) if limit > 0 else 1.0
    if factor < 1.0:
        torch._foreach_mul_(
            [parameter.grad for parameter in parameters if parameter.grad is not None], factor
        )
