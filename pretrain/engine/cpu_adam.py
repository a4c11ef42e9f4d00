"""DeepSpeed's CPU Adam remembers beta^t outside its state dict; this brings it back on resume.

Its C++ object keeps beta1^t and beta2^t as running products (csrc/includes/cpu_adam.h, IncrementStep) and computes a
power afresh when a step is not the next one, as happens after loading.  Product and power differ in the last bit, so a
resumed run would leave the uninterrupted one.  Steps of an optimizer of one element bring the products where they were.
"""

from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam


def replay_products(optimizer: Any) -> None:
    """Take the steps that the loaded state has behind it, on a parameter that nobody holds."""
    if not isinstance(optimizer, DeepSpeedCPUAdam):
        return
    steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    nobody = [torch.zeros(1) for _ in range(4)]  # parameter, gradient, two moments
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, 1e-8, 0.0, True, *nobody)
