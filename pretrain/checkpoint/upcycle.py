"""A dense checkpoint becomes a model with experts that computes the same at first (Komatsuzaki et al. 2022,
arXiv:2212.05055).

Every expert is a copy of the MLP; where experts are ``G`` times narrower, ``G`` neighbouring ones are its parts, and
share a router row, so that they are chosen together (virtual groups, He et al. 2024, arXiv:2410.07524).  The chosen
experts' weights add up to one, so copies give back the MLP's output, and parts a ``G``-th of it, which the down
projection makes good.  Shared experts begin with an output of zero.
"""

from typing import Any

import torch
from torch import nn

from model_providers.config import ModelConfig
from pretrain.checkpoint.weights import WeightLoader, state_of
from pretrain.errors import RunError

FC1, FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
LOOKS_AHEAD = "mtp."


class Upcycler(WeightLoader):
    """Fills layers with experts from a dense checkpoint, and others as they are."""

    def __init__(self, *arguments: Any, model: ModelConfig, **named: Any):
        super().__init__(*arguments, **named)
        self._model = model

    @torch.no_grad()
    def __call__(self, name: str, module: nn.Module) -> None:
        if name.startswith(LOOKS_AHEAD) and name not in self._source.files:
            return  # a dense model may have none; it keeps its initial weights
        state = state_of(module)
        if not any(key.startswith("mlp.experts.") for key in state):
            super().__call__(name, module)
            return
        found = dict(self._source.layer(name))
        if FC1 not in found:
            raise RunError(
                f"checkpoint.weights_from={self._source.folder}: {name} has experts there already; leave "
                "checkpoint.upcycle out"
            )
        fc1, fc2 = found.pop(FC1), found.pop(FC2)
        for key, tensor in state.items():
            if not key.startswith("mlp."):
                self._fill(f"{name}.{key}", tensor, self._asked(name, key, found))
        self._experts(name, state, fc1, fc2)

    def _asked(self, name: str, key: str, found: dict[str, torch.Tensor]) -> torch.Tensor:
        if key not in found:
            raise RunError(
                f"checkpoint.weights_from={self._source.folder}: {name}.{key} is not there; but for its experts the "
                "model section must be the one it was trained with"
            )
        return found[key]

    def _experts(self, name: str, state: dict[str, Any], fc1: torch.Tensor, fc2: torch.Tensor) -> None:
        moe, parts = self._model.moe, 2 if self._model.is_gated else 1
        assert moe is not None
        grain = self._grain(name, fc2.size(1))
        first = self._place.ep_rank * moe.num_experts // self._place.ep
        mine = range(first, first + moe.num_experts // self._place.ep)
        width = moe.ffn_hidden_size
        rows = fc1.unflatten(0, (parts, grain, width))  # [gate and up, parts of the MLP, their rows, h]
        columns = fc2.unflatten(1, (grain, width)) * (grain / moe.scaling_factor)
        self._fill(
            f"{name}.mlp.experts.linear_fc1.weight",
            state["mlp.experts.linear_fc1.weight"],
            torch.stack([rows[:, expert % grain].flatten(0, 1) for expert in mine]),
        )
        self._fill(
            f"{name}.mlp.experts.linear_fc2.weight",
            state["mlp.experts.linear_fc2.weight"],
            torch.stack([columns[:, expert % grain] for expert in mine]),
        )
        router = state["mlp.router.weight"]
        router.copy_(router[::grain].repeat_interleave(grain, dim=0))
        if "mlp.shared_experts.linear_fc2.weight" in state:
            state["mlp.shared_experts.linear_fc2.weight"].zero_()

    def _grain(self, name: str, width: int) -> int:
        """How many experts make one MLP."""
        moe = self._model.moe
        assert moe is not None
        grain = width // moe.ffn_hidden_size
        if grain * moe.ffn_hidden_size != width or moe.num_experts % grain or moe.top_k % grain:
            fitting = [
                n
                for n in range(1, moe.top_k + 1)
                if width % n == 0 == moe.num_experts % n and moe.top_k % n == 0
            ]
            sizes = " or ".join(str(width // n) for n in fitting)
            raise RunError(
                f"model.moe.ffn_hidden_size={moe.ffn_hidden_size}: {name} is {width} wide in "
                f"{self._source.folder}, and must be made of whole experts, as many as divide num_experts="
                f"{moe.num_experts} and top_k={moe.top_k}; use {sizes}"
            )
        return grain
