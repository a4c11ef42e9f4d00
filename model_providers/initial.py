"""Initial weights: a pure function of (seed, global layer, name of the parameter in the undivided model).

megatron-core draws in construction order from a global generator; here each parameter has its own generator,
the full matrix is drawn in fp32 on the CPU, and the rank keeps its share.  So tensor, pipeline, data
and expert layout, device, kernels and number format change no weight, and building touches no random state.
Experts are drawn one by one, each under its own number, so a rank draws its own alone.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from model_providers.config import ModelConfig
from model_providers.layout import TensorPlace
from model_providers.logical import describe, split
from model_providers.random_streams import derive_seed

RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")  # the two that add to the residual stream


@torch.no_grad()
def draw_weights(
    module: nn.Module,
    model: ModelConfig,
    seed: int,
    layer_name: str,
    place: TensorPlace,
    *,
    tied: Mapping[str, str] | None = None,
) -> None:
    """Fill ``module``'s parameters; those in ``tied`` are drawn under the full names that it gives instead."""
    for name, description in describe(module, place).items():
        parameter = module.get_parameter(name)
        std = standard_deviation(model, name, parameter)
        if std is None:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        full_name = (tied or {}).get(name, f"{layer_name}.{name}")
        if not description.is_expert:
            parameter.copy_(split(_drawn(description.shape, std, seed, full_name), description, place))
            continue
        one = description._replace(shape=(1, *description.shape[1:]))
        alone = place._replace(ep=1, ep_rank=0)
        for index, expert in enumerate(parameter):
            number = place.ep_rank * len(parameter) + index
            drawn = _drawn(one.shape, std, seed, f"{full_name}.{number}")
            expert.copy_(split(drawn, one, alone)[0])


def _drawn(shape: tuple[int, ...], std: float, seed: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive_seed("weights", seed, name))
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def standard_deviation(model: ModelConfig, name: str, parameter: torch.Tensor) -> float | None:
    """None for biases (zero) and norms (one)."""
    if parameter.dim() < 2:
        return None
    if model.scale_residual_init and name.endswith(RESIDUAL_OUTPUTS):
        return model.init_std / math.sqrt(2.0 * model.num_layers)  # Radford et al. 2019, section 2.3
    return model.init_std
