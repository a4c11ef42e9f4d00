"""Whose FP8 a model gets: Transformer Engine's where its layers are taken and the hardware can do it, else ours."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from model_providers.errors import ModelError
from model_providers.fp8.config import RECIPES, Fp8Config
from model_providers.fp8.transformer_engine import (
    EightBitBlock,
    Library,
    Steps,
    open_library,
    recipe_obstacle,
)
from model_providers.kernels import Kernels, fp8_kernels, transformer_engine_obstacle

logger = logging.getLogger(__name__)

ToEightBits = Callable[[Kernels], Kernels]  # called once for each block


def choose_fp8(
    facts: Fp8Config, kernels: Kernels, device: torch.device, groups: Any, *, recomputes: bool
) -> ToEightBits:
    """How a block's kernels become eight-bit ones; says in one line what `auto` took, and why.

    ``groups``: a ProcessGroupCollection; delayed scales are agreed on over tp x dp, the ranks of the same layers.
    """
    if facts.backend == "torch":
        return partial(fp8_kernels, facts=facts)
    obstacle = _obstacle(facts, kernels, device)
    if obstacle is None:
        logger.info("fp8.backend=%s: Transformer Engine's %s recipe", facts.backend, facts.recipe)
        return te_fp8(open_library(), facts, groups.tp_dp_cp, recomputes=recomputes)
    if facts.backend == "te":
        raise ModelError(
            f"fp8.backend=te with fp8.recipe={facts.recipe}: {obstacle}; use fp8.backend=torch, or auto, which falls "
            "back by itself"
        )
    logger.info("fp8.backend=auto: torch, because %s", obstacle)
    return partial(fp8_kernels, facts=facts)


def te_fp8(library: Library, facts: Fp8Config, group: Any, *, recomputes: bool) -> ToEightBits:
    """Blocks of Transformer Engine's layers that enter its context around their work."""
    steps = Steps(library, facts, group, keeps_weights=not recomputes)

    def to_eight_bits(kernels: Kernels) -> Kernels:
        types = (kernels.column_linear, kernels.row_linear)
        name = f"{kernels.name}, {facts.recipe} fp8"
        return kernels._replace(name=name, precision=EightBitBlock(facts, steps, types))

    return to_eight_bits


def recipe_obstacles(device: str) -> dict[str, str | None]:
    """For each recipe, why Transformer Engine does not follow it here; None where it does."""
    found = transformer_engine_obstacle(device)
    if found is not None:
        return dict.fromkeys(RECIPES, found)
    library = open_library()
    return {recipe: recipe_obstacle(library, Fp8Config(recipe=recipe)) for recipe in RECIPES}


def _obstacle(facts: Fp8Config, kernels: Kernels, device: torch.device) -> str | None:
    found = transformer_engine_obstacle(device.type)
    if found is not None:
        return found
    if not kernels.is_transformer_engine:
        return f"the layers are {kernels.name}'s"
    return recipe_obstacle(open_library(), facts)
