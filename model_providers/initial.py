"""Initial weights: a pure function of (seed, global layer, name of the parameter in the undivided model).

megatron-core draws in construction order from a global generator; here each parameter has its own generator,
the full matrix is drawn in fp32 on the CPU, and the rank keeps its share.  So tensor, pipeline and data
layout, device, kernels and number format change no weight, and building touches no random state.
"""

import math

import torch
from torch import nn

from model_providers.config import ModelConfig
from model_providers.logical import describe, split
from model_providers.random_streams import derive_seed

RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")  # the two that add to the residual stream


@torch.no_grad()
def draw_weights(
    module: nn.Module,
    model: ModelConfig,
    seed: int,
    layer_name: str,
    *,
    tp_rank: int,
    tp: int,
    tied_to: str | None = None,
) -> None:
    """Fill ``module``'s parameters; ``tied_to`` is the full name under which its weight is drawn instead."""
    for name, description in describe(module, tp).items():
        parameter = module.get_parameter(name)
        std = standard_deviation(model, name, parameter)
        if std is None:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        generator = torch.Generator().manual_seed(
            derive_seed("weights", seed, tied_to or f"{layer_name}.{name}")
        )
        full = torch.empty(description.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        parameter.copy_(split(full, description, tp_rank, tp))


def standard_deviation(model: ModelConfig, name: str, parameter: torch.Tensor) -> float | None:
    """None for biases (zero) and norms (one)."""
    if parameter.dim() < 2:
        return None
    if model.scale_residual_init and name.endswith(RESIDUAL_OUTPUTS):
        return model.init_std / math.sqrt(2.0 * model.num_layers)  # Radford et al. 2019, section 2.3
    return model.init_std
