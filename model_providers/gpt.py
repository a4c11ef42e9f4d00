"""GPT as a plan of layers: embedding, blocks, final norm, layers that look ahead, head."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import tensor_parallel
from torch import nn

from model_providers import mcore_on_cpu
from model_providers.config import ModelConfig
from model_providers.cost import layer_costs
from model_providers.dispatch import Nodes
from model_providers.errors import ModelError
from model_providers.initial import draw_weights
from model_providers.kernels import choose_kernels
from model_providers.layer_plan import GPTInputs, GPTValue, LayerPlan, PlannedLayer, Recompute, Tie
from model_providers.layout import Layout, TensorPlace, layout_problems
from model_providers.losses import VocabularyShare, WeightedLoss
from model_providers.masks import MaskMaker
from model_providers.mcore_config import mcore_config
from model_providers.moe_layer import ExpertPlace
from model_providers.rotary import RotaryTable
from model_providers.stage_modules import Block, Embedding, FinalNorm, Head, LookAhead

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
    nodes: Nodes | None = None,
) -> LayerPlan:
    """``groups``: a ProcessGroupCollection with tp, cp and pp, and with experts all that concerns them; or
    ``solo_groups()`` for a single process.  ``nodes``: how ranks that share experts lie on machines.
    """
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
        etp=layout.expert_tp,
        sequence_parallel=layout.shards_sequence,
        bytes_per_value=params_dtype.itemsize,
    )
    experts = ExpertPlace(groups, layout, nodes)

    def block(index: int, has_experts: bool) -> Block:
        return Block(config, groups, chosen, index, rotary, masks, experts if has_experts else None)

    def look_ahead(depth: int) -> LookAhead:
        inner = block(model.num_layers + depth - 1, model.moe is not None)
        return LookAhead(model, config, groups, chosen, depth, inner)

    modules: dict[str, Callable[[], nn.Module]] = {"embedding": partial(Embedding, model, config, groups)}
    for index in range(model.num_layers):
        modules[f"layers.{index}"] = partial(block, index, model.has_experts(index))
    modules["final_norm"] = partial(FinalNorm, config, chosen)
    depths = range(1, model.mtp.depth + 1) if model.mtp is not None else ()
    for depth in depths:
        modules[f"mtp.{depth - 1}"] = partial(look_ahead, depth)
    modules["head"] = partial(Head, model, config, groups, chosen)
    ties = tuple(Tie("embedding", WORD_EMBEDDINGS, f"mtp.{depth - 1}", WORD_EMBEDDINGS) for depth in depths)
    if model.tie_embeddings:
        ties += (Tie("embedding", WORD_EMBEDDINGS, "head", "weight"),)
    finish = _Finish(model, seed, tensor_place(model, layout, groups), ties, device)
    return LayerPlan(
        layers=tuple(
            PlannedLayer(
                name, partial(finish.build, name, construct), cost, name.startswith(("layers.", "mtp."))
            )
            for (name, construct), cost in zip(modules.items(), costs, strict=True)
        ),
        ties=ties,
        loss=WeightedLoss(
            VocabularyShare(model.known_vocab_size, model.padded_vocab_size, groups.tp),
            ahead_weight=model.mtp.loss_weight if model.mtp is not None else 0.0,
        ),
        inputs_type=GPTInputs,
        value_type=GPTValue,
        recompute=recompute,
        checkpoint_function=checkpoint,
    )


def tensor_place(model: ModelConfig, layout: Layout, groups: Any) -> TensorPlace:
    """Which share of each parameter this rank holds."""
    dense = TensorPlace(tp=layout.tp, tp_rank=groups.tp.rank())
    if model.moe is None:
        return dense
    return dense._replace(
        etp=layout.expert_tp, etp_rank=groups.expt_tp.rank(), ep=layout.ep, ep_rank=groups.ep.rank()
    )


class _Finish(NamedTuple):
    """From a constructed module to one with its weights, on its device."""

    model: ModelConfig
    seed: int
    place: TensorPlace
    ties: tuple[Tie, ...]
    device: torch.device

    def build(self, name: str, construct: Any) -> nn.Module:
        module = construct()
        tied = {
            tie.user_parameter: f"{tie.owner}.{tie.owner_parameter}" for tie in self.ties if tie.user == name
        }
        draw_weights(module, self.model, self.seed, name, self.place, tied=tied)
        if self.model.draws_in_training:
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
    """What megatron-core's layers ask for by these names."""

    tp: Any
    cp: Any
    pp: Any
    ep: Any
    expt_tp: Any
    expt_dp: Any
    tp_ep: Any
    tp_cp: Any
    tp_dp_cp: Any


def solo_groups() -> SoloGroups:
    """The groups of a single process: tests, generation, benchmarks."""
    return SoloGroups(*(_SoloGroup() for _ in SoloGroups._fields))
