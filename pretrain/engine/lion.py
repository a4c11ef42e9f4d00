"""Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2), on CPUs and on CUDA, offloaded or not.

DeepSpeed 0.19 takes the sign of zero for +1 (csrc/lion/cpu_lion_impl.cpp) or -1 (csrc/lion/multi_tensor_lion.cu),
so that whatever never had a gradient moves by the learning rate at each step: rows of words that do not occur, unused
positions, experts without tokens.  Here the sign of zero is zero.  Needs no compiler.
"""

from typing import Any

import torch
from deepspeed.ops.lion import DeepSpeedCPULion

BLOCK = 1 << 18  # elements: what is computed on the way stays in a core's cache


class Lion(DeepSpeedCPULion):
    """DeepSpeed offloads optimizers of its own kinds alone: the kind is theirs, the arithmetic torch's."""

    def __init__(
        self,
        groups: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        torch.optim.Optimizer.__init__(self, groups, defaults)  # without DeepSpeed's kernel

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step on every parameter that has a gradient; the moments are fp32."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["step"] += 1
                _update(parameter, parameter.grad, state["exp_avg"], group, beta1, beta2)
        return None


def _update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    moment: torch.Tensor,
    group: dict[str, Any],
    beta1: float,
    beta2: float,
) -> None:
    keep = 1.0 - group["lr"] * group["weight_decay"]
    parts = (tensor.reshape(-1).split(BLOCK) for tensor in (parameter.data, gradient, moment))
    for weights, slopes, moments in zip(*parts, strict=True):
        slopes = slopes.to(moments.dtype)
        direction = torch.lerp(slopes, moments, beta1).sign_()
        if keep != 1.0:
            weights.mul_(keep)
        weights.add_(direction.to(weights.dtype), alpha=-group["lr"])
        moments.lerp_(slopes, 1.0 - beta2)
