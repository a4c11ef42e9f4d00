"""The model families, by the name that a run file gives: what makes the plan of each.

The program that trains a family is `pretrain.<name>`.
"""

from collections.abc import Callable
from typing import Any

from model_providers import bert, gpt, t5
from model_providers.building import Building
from model_providers.config import ModelConfig
from model_providers.layer_plan import LayerPlan
from model_providers.layout import Layout

PLANS: dict[str, Callable[[Building], LayerPlan]] = {"gpt": gpt.plan, "bert": bert.plan, "t5": t5.plan}


def build_plan(
    model: ModelConfig, layout: Layout, groups: Any, *, seed: int, sequence_length: int, **options: Any
) -> LayerPlan:
    """The model as layers; ``options`` are those of `Building.prepare`."""
    building = Building.prepare(model, layout, groups, seed=seed, sequence_length=sequence_length, **options)
    return PLANS[model.family](building)
