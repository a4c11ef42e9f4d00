"""GPT as a plan of layers: embedding, blocks, final norm, layers that look ahead, head."""

from functools import partial
from typing import Any

import torch

from model_providers.building import NO_RECOMPUTE, WORD_EMBEDDINGS, Building, Construct, checkpoint
from model_providers.config import ModelConfig
from model_providers.dispatch import Nodes
from model_providers.layer_plan import GPTInputs, GPTValue, LayerPlan, Recompute, Tie
from model_providers.layout import Layout
from model_providers.losses import VocabularyShare, WeightedLoss
from model_providers.masks import MaskMaker
from model_providers.moe_layer import ExpertPlace
from model_providers.rotary import RotaryTable
from model_providers.stage_modules import Block, Embedding, FinalNorm, Head, LookAhead


def build_plan(
    model: ModelConfig,
    layout: Layout,
    groups: Any,
    *,
    seed: int,
    sequence_length: int,
    target_length: int | None = None,
    params_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kernels: str = "auto",
    recompute: Recompute = NO_RECOMPUTE,
    nodes: Nodes | None = None,
) -> LayerPlan:
    """``groups``: a ProcessGroupCollection with tp, cp and pp, and with experts all that concerns them; or
    ``solo_groups()`` for a single process.  ``nodes``: how ranks that share experts lie on machines.
    """
    building = Building.prepare(
        model,
        layout,
        groups,
        seed=seed,
        sequence_length=sequence_length,
        params_dtype=params_dtype,
        device=device,
        kernels=kernels,
        recompute=recompute,
    )
    config, chosen = building.config, building.kernels
    rotary = RotaryTable(model) if model.position_embedding == "rotary" else None
    masks = MaskMaker(has_prefix=model.attention == "prefix")
    experts = ExpertPlace(groups, layout, nodes)

    def block(index: int, has_experts: bool) -> Block:
        placed = experts if has_experts else None
        return Block(config, groups, chosen, index, rotary, masks, placed, is_causal=model.is_causal)

    def look_ahead(depth: int) -> LookAhead:
        inner = block(model.num_layers + depth - 1, model.moe is not None)
        return LookAhead(model, config, groups, chosen, depth, inner)

    modules: dict[str, Construct] = {"embedding": partial(Embedding, model, config, groups)}
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
    return LayerPlan(
        layers=building.layers(modules, ties, checkpointable=("layers.", "mtp.")),
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
