"""Where DeepSpeed's choice of optimizer needs a word of ours: Lion on a CPU, and which matrices Muon takes."""

from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.ops.lion import DeepSpeedCPULion
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from pretrain.ds_config import optimizer_is_offloaded


def client_optimizer(document: dict[str, Any], groups: list[dict[str, Any]], device: torch.device) -> Any:
    """An optimizer that DeepSpeed would not find by itself, or None.

    Without offload it takes its CUDA kernel for Lion, also on a CPU; its CPU kernel does the same there.
    """
    optimizer = document["optimizer"]
    if optimizer["type"].lower() == "lion" and device.type == "cpu" and not optimizer_is_offloaded(document):
        return DeepSpeedCPULion(groups, **optimizer["params"])
    return None


def set_flags(config: DeepSpeedConfig, module: nn.Module) -> None:
    """DeepSpeed's marks on parameters; the head goes to Muon's Adam, like the embedding.

    DeepSpeed knows heads by the name ``lm_head``.  Muon is for hidden matrices (Jordan et al. 2024).
    """
    deepspeed.set_optimizer_flags(config, module)
    for parameter in heads(module.named_parameters()):
        if hasattr(parameter, "use_muon"):
            parameter.use_muon = False  # type: ignore[attr-defined]


def heads(named: Iterable[tuple[str, nn.Parameter]]) -> Iterable[nn.Parameter]:
    return (parameter for name, parameter in named if name.startswith("head."))
