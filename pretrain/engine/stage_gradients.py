"""A pipeline rank's gradients: where the optimizer keeps them, and how they are summed over stages and copies.

DeepSpeed's optimizers differ in this: the parameter's own ``grad``, an accumulator beside it (``grad_accum``), or the
bf16 optimizer's fp32 copies (``_hp_grad``).  This mixin is the only place of ours that knows.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from pretrain.engine.averaging import Averages, FinishedChunks, is_plain_average
from pretrain.engine.fillers import fillers
from pretrain.engine.groups import Groups


class StageGradients(PipelineEngine):
    """For a pipeline engine whose module has ``chunks``; `begin_gradients` once, before the first step."""

    finished: FinishedChunks | None  # None: DeepSpeed averages, after the last operation
    _shards_gradients: bool

    def begin_gradients(self, groups: Groups) -> None:
        self._shards_gradients = self.zero_optimization_partition_gradients()
        self.finished = None
        if self._may_average_early():
            chunks = [
                [parameter for layer in chunk for parameter in layer.module.parameters()]
                for chunk in self.module.chunks
            ]
            self.finished = FinishedChunks(chunks, self.gradient, Averages(groups.dp, groups.experts.edp))
        if self.using_bf16_optimizer:
            self._places_in_optimizer = {
                id(parameter): (i, j)
                for i, group in enumerate(self.optimizer.bf16_groups)
                for j, parameter in enumerate(group)
            }

    def _may_average_early(self) -> bool:
        """Whether nothing but the average stands between a backward pass and the optimizer.

        DeepSpeed's ZeRO optimizers shard, convert or offload gradients while they reduce them, and it scales them
        on the way if its configuration says so: then it has to do the work itself, after the last operation.
        """
        if self._shards_gradients or not is_plain_average(self):
            return False
        if self.zero_optimization() and not self.using_bf16_optimizer:
            optimizer = self.optimizer
            if optimizer.cpu_offload or optimizer.gradient_accumulation_dtype != optimizer.dtype:
                return False
            return self.communication_data_type == optimizer.dtype
        return self.communication_data_type == torch.float32

    def before_passes(self) -> None:
        """ZeRO-2 sums into shards after every backward pass, and must not take any for the step's last."""
        if self._shards_gradients:
            self.optimizer.set_gradient_accumulation_boundary(False)

    def after_backward(self, chunk: int) -> None:
        """What an optimizer that keeps sums of its own asks for after each chunk's backward pass."""
        if self.using_bf16_optimizer:  # its sums have them; the next chunk's must not add them again
            for layer in self.module.chunks[chunk]:
                for parameter in layer.module.parameters():
                    parameter.grad = None
        if self._shards_gradients:  # hooks have filled the buckets: sum them into this rank's shard now
            self.optimizer.overlapping_partition_gradients_reduce_epilogue()

    def accumulate(self, parameter: Any, gradient: torch.Tensor) -> None:
        """Add a gradient that was computed apart to where the optimizer looks for it."""
        if self.using_bf16_optimizer:
            parameter.grad = gradient
            self.optimizer._update_hp_grad(parameter, *self._places_in_optimizer[id(parameter)], False)
            parameter.grad = None
            return
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        if getattr(self.optimizer, "use_grad_accum_attribute", False):
            self.optimizer._fill_param_grad_accum_attribute(parameter)

    def gradient(self, parameter: Any) -> torch.Tensor:
        """The sum so far, where the optimizer keeps it."""
        if self.using_bf16_optimizer:
            return parameter._hp_grad
        if getattr(self.optimizer, "use_grad_accum_attribute", False):
            found = parameter.grad_accum
        else:
            found = parameter.grad
        assert found is not None, "a parameter has no gradient after its chunk's last backward pass"
        return found

    def after_passes(self) -> None:
        """Sums over tied copies and averages over the copies of the model; then the optimizer may step."""
        for filler in fillers(self.module):
            self.accumulate(filler, torch.zeros_like(filler))
        if self.finished is not None:
            self.finished.averages.finish()
        self._exec_reduce_tied_grads()
        if self.finished is None and not self._shards_gradients:
            self._exec_reduce_grads()
        elif self.zero_optimization() and not self.using_bf16_optimizer:
            self.optimizer.set_gradient_accumulation_boundary(True)
            self.optimizer.setup_buckets()  # the closing sum expects them, though they stay empty
            self.optimizer.overlapping_partition_gradients_reduce_epilogue()

    def _exec_reduce_tied_grads(self) -> None:
        """Sum tied gradients over their stages.

        DeepSpeed 0.19 looks at ``weight.grad`` and skips the sum in silence when it is None, which unties the
        weights under bf16, fp32 accumulation and CPU offload.
        """
        for parameter, group in self.module.get_tied_weights_and_groups():
            dist.all_reduce(self.gradient(parameter), group=group)
