"""Groups of parameters that every pipeline stage has.

DeepSpeed's optimizers take the norm of one group after the other, each together with the other stages.  A stage without
norms or biases (a head alone), or without experts, would have a group less, and all would wait for each other for ever.
So such a stage gets a parameter of one number that nothing reads, whose gradient is zero.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from torch import nn

from pretrain.engine.groups import Groups

PREFIX = "filler"


def fill(module: Any, parameter_groups: list[dict[str, Any]], groups: Groups, *, expert_group: str) -> None:
    """Add to ``module`` and to its groups what the other stages have and this one lacks; collective over pp."""
    mine = {
        (index, is_moe_param(parameter))
        for index, group in enumerate(parameter_groups)
        for parameter in group["params"]
    }
    told: list[Any] = [None] * groups.layout.pp
    dist.all_gather_object(told, mine, group=groups.pp)
    like = next(module.parameters())
    for index, is_expert in sorted(set().union(*told) - mine):
        filler = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
        if is_expert:
            filler.allreduce, filler.group_name = False, expert_group  # type: ignore[attr-defined]
        module.register_parameter(f"{PREFIX}{index}{'_of_experts' if is_expert else ''}", filler)
        parameter_groups[index]["params"].append(filler)


def fillers(module: nn.Module) -> list[nn.Parameter]:
    return [
        parameter for name, parameter in module.named_parameters(recurse=False) if name.startswith(PREFIX)
    ]
