"""Why an architecture of theirs cannot express a model of ours."""

from collections.abc import Mapping
from typing import Any

from model_providers.config import ModelConfig

# What no architecture here has, but for those that ask for it themselves.
PLAIN: dict[str, Any] = {
    "sliding_window": None,
    "moe": None,
    "mla": None,
    "mtp": None,
    "bert": None,
    "t5": None,
    "electra": None,
    "attention": "causal",
}


def differences(model: ModelConfig, wanted: Mapping[str, Any]) -> list[str]:
    """``key=value`` of every fact that is not as wanted."""
    if model.electra is not None:
        return ["model.electra: a generator and an encoder are no architecture of these"]
    found = []
    for key, value in wanted.items():
        fact = getattr(model, key)
        if fact != value:
            found.append(key if hasattr(fact, "model_fields") else f"{key}={fact}")
    return found
