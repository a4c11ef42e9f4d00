"""Partial offload (`offload_optimizer.ratio`, ZeRO-Offload++): what DeepSpeed 0.19's second optimizer lacks.

The sub-groups that stay on the device are stepped by an AdamW of their own (deepspeed/runtime/zero/stage3.py,
``backup_optimizer``).  Its first group of settings is a copy made once, which keeps the first learning rate for ever;
its moments are not in checkpoints; and after a checkpoint was loaded, its groups hold all parameters.
"""

from pathlib import Path
from typing import Any

import torch

FILE = "device_states.rank{rank:05d}.pt"


def is_divided(engine: Any) -> bool:
    """Whether some of the optimizer is offloaded and some is not."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() != 3 or not optimizer.offload_optimizer:
        return False
    return bool(optimizer.partial_offload != 1.0)


def follow_settings(engine: Any) -> None:
    """Learning rates and the like, of the groups whose settings are copies."""
    optimizer = engine.optimizer
    for copy, original in zip(
        optimizer.backup_optimizer.param_groups, optimizer.optimizer.param_groups, strict=True
    ):
        copy.update({key: value for key, value in original.items() if key != "params" and key in copy})


def save(engine: Any, folder: Path) -> None:
    """The moments on this rank's device, by sub-group."""
    optimizer = engine.optimizer
    states = [
        optimizer.backup_optimizer.state.get(master) for master in optimizer.fp32_partitioned_groups_flat
    ]
    torch.save(states, folder / FILE.format(rank=engine.global_rank))


def load(engine: Any, folder: Path) -> None:
    optimizer = engine.optimizer
    second = optimizer.backup_optimizer
    for group in second.param_groups:
        group["params"] = []
    states = torch.load(folder / FILE.format(rank=engine.global_rank), map_location="cpu", weights_only=True)
    for master, state in zip(optimizer.fp32_partitioned_groups_flat, states, strict=True):
        if state is not None:
            second.state[master] = {key: _beside(master, value) for key, value in state.items()}


def _beside(master: torch.Tensor, value: Any) -> Any:
    """Moments on the device; the count of steps where torch's AdamW keeps it, in the CPU's memory."""
    is_moment = isinstance(value, torch.Tensor) and value.numel() == master.numel() and value.dim() > 0
    return value.to(master.device) if is_moment else value
