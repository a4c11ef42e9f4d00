"""Where DeepSpeed's choice of optimizer needs a word of ours, and the optimizers that it does not have.

The only file that loads bitsandbytes, which may be missing (`optimizer_rules.missing_package` says so beforehand).
"""

import importlib
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from pretrain.engine.adafactor import ShardedAdafactor
from pretrain.engine.galore import GaLore
from pretrain.engine.groups import Groups
from pretrain.engine.layers import tied_to_embedding
from pretrain.engine.lion import Lion
from pretrain.engine.matrix_optimizer import MatrixOptimizer, Spread
from pretrain.optimizer_facts import LIGHT_PACKAGE, galore_params


def client_optimizer(
    document: dict[str, Any], groups: list[dict[str, Any]], module: nn.Module, device: torch.device
) -> Any:
    """An optimizer that DeepSpeed would not find by itself, or None.

    Adafactor of whole tensors is torch's, of ZeRO's partitions ours.
    """
    kind, params = document["optimizer"]["type"], document["optimizer"]["params"]
    if kind == "Lion":
        return Lion(groups, **params)
    if kind == "AdamW8bit":
        return importlib.import_module(f"{LIGHT_PACKAGE}.optim").AdamW8bit(groups, **params)
    if kind == "GaLore":
        settings = galore_params(params)
        hidden = hidden_matrices(module, embeddings=settings.embeddings)
        projected = {id(parameter) for parameter in hidden}
        return GaLore(groups, hidden=projected, **{**params, **settings._asdict()})
    if kind == "Adafactor" and document["zero_optimization"]["stage"]:
        return ShardedAdafactor(groups, **params)
    return None


def tell_partitions(engine: DeepSpeedEngine, groups: Groups) -> None:
    """An optimizer that looks at matrices hears that ZeRO has put partitions in their place."""
    optimizer = engine.basic_optimizer
    if isinstance(optimizer, MatrixOptimizer) and engine.zero_optimization():
        optimizer.partitioned(Spread(groups.place.dp, groups.layout.dp, groups.dp))


def set_flags(config: DeepSpeedConfig, module: nn.Module) -> None:
    """DeepSpeed's marks on parameters; the head goes to Muon's Adam, like the embedding.

    DeepSpeed knows heads by the name ``lm_head``.  Muon is for hidden matrices (Jordan et al. 2024).
    """
    deepspeed.set_optimizer_flags(config, module)
    for parameter in heads(module.named_parameters()):
        if hasattr(parameter, "use_muon"):
            parameter.use_muon = False  # type: ignore[attr-defined]


def hidden_matrices(module: Any, *, embeddings: bool = False) -> list[nn.Parameter]:
    """What is no vector, and neither embedding nor head unless ``embeddings``."""
    outer = {id(parameter) for parameter in heads(module.named_parameters())}
    tied = tied_to_embedding(module.plan)
    return [
        parameter
        for name, parameter in module.named_parameters()
        if parameter.dim() == 2
        and (embeddings or not ("embed" in name or name in tied or id(parameter) in outer))
    ]


def heads(named: Iterable[tuple[str, nn.Parameter]]) -> Iterable[nn.Parameter]:
    return (parameter for name, parameter in named if name.startswith("head."))
