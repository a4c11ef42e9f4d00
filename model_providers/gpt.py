"""GPT as a plan of layers: embedding, blocks, final norm, head."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import tensor_parallel
from torch import nn

from model_providers import mcore_on_cpu
from model_providers.config import ModelConfig
from model_providers.cost import layer_costs
from model_providers.errors import ModelError
from model_providers.initial import draw_weights
from model_providers.kernels import choose_kernels
from model_providers.layer_plan import GPTInputs, GPTValue, LayerPlan, PlannedLayer, Recompute, Tie
from model_providers.layout import Layout, layout_problems
from model_providers.losses import VocabularyShare, WeightedLoss
from model_providers.masks import MaskMaker
from model_providers.mcore_config import mcore_config
from model_providers.rotary import RotaryTable
from model_providers.stage_modules import Block, Embedding, FinalNorm, Head

WORD_EMBEDDINGS = "word_embeddings.weight"
NO_RECOMPUTE = Recompute()


def build_plan(
    model: ModelConfig,
    layout: Layout,
    groups: Any,
    *,
    seed: int,
    sequence_length: int,
    params_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kernels: str = "auto",
    recompute: Recompute = NO_RECOMPUTE,
) -> LayerPlan:
    """``groups``: a ProcessGroupCollection with tp, cp and pp, or ``solo_groups()`` for a single process."""
    problems = layout_problems(model, layout, sequence_length)
    if problems:
        raise ModelError("; ".join(problems))
    device = torch.device(device)
    mcore_on_cpu.install(device.type)
    chosen = choose_kernels(kernels, device.type)
    config = mcore_config(
        model, layout, params_dtype=params_dtype, recompute=recompute.checked(), fuse=chosen.fuse
    )
    rotary = RotaryTable(model) if model.position_embedding == "rotary" else None
    masks = MaskMaker()
    costs = layer_costs(
        model,
        sequence_length,
        recompute=recompute.mode,
        tp=layout.tp,
        sequence_parallel=layout.shards_sequence,
        bytes_per_value=params_dtype.itemsize,
    )
    modules: dict[str, Callable[[], nn.Module]] = {"embedding": partial(Embedding, model, config, groups)}
    for index in range(model.num_layers):
        modules[f"layers.{index}"] = partial(Block, config, groups, chosen, index, rotary, masks)
    modules |= {
        "final_norm": partial(FinalNorm, config, chosen),
        "head": partial(Head, model, config, groups, chosen),
    }
    finish = _Finish(model, seed, groups.tp.rank(), layout.tp, device)
    return LayerPlan(
        layers=tuple(
            PlannedLayer(name, partial(finish.build, name, construct), cost, name.startswith("layers."))
            for (name, construct), cost in zip(modules.items(), costs, strict=True)
        ),
        ties=(Tie("embedding", WORD_EMBEDDINGS, "head", "weight"),) if model.tie_embeddings else (),
        loss=WeightedLoss(VocabularyShare(model.known_vocab_size, model.padded_vocab_size, groups.tp)),
        inputs_type=GPTInputs,
        value_type=GPTValue,
        recompute=recompute,
        checkpoint_function=checkpoint,
    )


class _Finish(NamedTuple):
    """From a constructed module to one with its weights, on its device."""

    model: ModelConfig
    seed: int
    tp_rank: int
    tp: int
    device: torch.device

    def build(self, name: str, construct: Any) -> nn.Module:
        module = construct()
        tied = f"embedding.{WORD_EMBEDDINGS}" if name == "head" and self.model.tie_embeddings else None
        draw_weights(module, self.model, self.seed, name, tp_rank=self.tp_rank, tp=self.tp, tied_to=tied)
        if self.model.hidden_dropout or self.model.attention_dropout:
            module.stream = name
        return module.to(self.device)


def checkpoint(function: Any, *tensors: torch.Tensor) -> Any:
    """Run ``function`` without keeping its activations, and again in the backward pass with equal streams."""
    return tensor_parallel.checkpoint(function, False, *tensors)


class _SoloGroup:
    """As much of a process group of one as megatron-core's layers ask for; nothing is initialised."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class SoloGroups(NamedTuple):
    tp: Any
    cp: Any
    pp: Any


def solo_groups() -> SoloGroups:
    """The groups of a single process: tests, generation, benchmarks."""
    return SoloGroups(_SoloGroup(), _SoloGroup(), _SoloGroup())
