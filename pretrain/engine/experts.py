"""Experts under DeepSpeed: whose groups, which marks, and what an optimizer step must do for routers.

megatron-core shares experts out over groups that DeepSpeed does not know; DeepSpeed reduces and shards what carries its
marks, over groups that it looks up by name.  So the groups are put where it looks, under the name that the marks have.
Its own expert layers, and its files for them, are not used: weights of experts are in our own files.
"""

from typing import Any

import deepspeed.utils.groups as deepspeed_groups
import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from model_providers.logical import is_routed_expert
from model_providers.router import Router, set_loss_scale
from pretrain.engine.groups import Groups


def group_name(groups: Groups) -> str:
    """DeepSpeed reads the number in it (deepspeed/utils/groups.py, _get_max_expert_size)."""
    return f"ep_size_{groups.layout.ep}"


def register_groups(groups: Groups, shared: dist.ProcessGroup) -> None:
    """Give DeepSpeed the groups of ranks that share experts out, and that hold replicas of them.

    It uses ``shared`` for norms alone: over it, squares of the experts' gradients are summed.
    """
    name = group_name(groups)
    for registry, ranks, group in (
        (
            deepspeed_groups._EXPERT_PARALLEL_GROUP,
            deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS,
            shared,
        ),
        (
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
            groups.experts.edp,
        ),
    ):
        registry[name] = group
        ranks[name] = dist.get_process_group_ranks(group)


class ExpertMarks:
    """Puts DeepSpeed's marks on a layer's experts as soon as it is built (a ``prepare`` step of `build_layers`)."""

    def __init__(self, groups: Groups, zero_stage: int):
        self._groups, self._zero_stage = groups, zero_stage
        # Below stage 3, ZeRO's optimizers sum over the tensor group too (stage_1_and_2.py, get_grad_norm_direct).
        register_groups(groups, groups.experts.ep if zero_stage == 3 else groups.experts.norm)

    def __call__(self, name: str, module: nn.Module) -> None:
        for parameter in routed_experts(module):
            parameter.group_name = group_name(self._groups)
            if self._zero_stage == 3:
                # The words of DeepSpeed's AutoEP (deepspeed/runtime/zero/stage3.py, partition_parameters.py).
                parameter.ds_zero_placement_family = "autoep_expert"
                parameter.ds_zero_partition_group_name = parameter.group_name
                parameter.ds_zero_partition_process_group = self._groups.experts.edp


def sum_norms_over_whole_copies(groups: Groups) -> None:
    """For DeepSpeed's BF16_Optimizer, which sums experts over no other group of a stage (runtime/utils.py,
    get_norm_with_moe_layers): with the group of ZeRO's optimizers it left out the experts of other tensor ranks.
    """
    register_groups(groups, groups.experts.copy)


def routed_experts(module: nn.Module) -> list[Any]:
    """Its parameters that ep shares out."""
    return [parameter for parameter in module.parameters() if is_routed_expert(parameter)]


def optimizer_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of parameters, those of experts apart, as DeepSpeed's optimizers want them."""
    for index, group in enumerate(groups):
        group["name"] = f"dense-{index}"
    return split_params_into_different_moe_groups_for_optimizer(groups)


def routers(module: nn.Module) -> list[Router]:
    """In the order of the layers."""
    return [part for part in module.modules() if isinstance(part, Router)]


def begin_step(*, loss_scale: float, num_micro_batches: int, device: torch.device) -> None:
    """Auxiliary losses count like the losses of the micro-batches that they belong to."""
    set_loss_scale(loss_scale / num_micro_batches, device)
