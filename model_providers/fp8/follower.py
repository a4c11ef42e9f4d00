"""What follows a recipe, as the engine, checkpoints and guards see it: a linear of ours, or a block of TE's layers."""

from typing import Any, Protocol

import torch

from model_providers.fp8.config import Fp8Config


class Follower(Protocol):
    """`scaling.Scaling` of one linear, `transformer_engine.EightBitBlock` of all linears of a block."""

    facts: Fp8Config
    name: str  # the whole model's
    has_begun: bool  # its first step has come
    is_barred: bool  # a guard took it out, for good

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember beside weights."""

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """What `state` gave; of another recipe or backend, what they have in common."""
