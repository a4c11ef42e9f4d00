"""BERT as a plan of layers: embedding, blocks that see both ways, final norm where norms come first, head."""

from functools import partial
from typing import Any

import torch

from model_providers.building import NO_RECOMPUTE, WORD_EMBEDDINGS, Building, Construct, checkpoint
from model_providers.config import ModelConfig
from model_providers.electra import build_electra_plan
from model_providers.encoder_modules import EncoderEmbedding, EncoderHead
from model_providers.errors import ModelError
from model_providers.layer_plan import BERTInputs, GPTValue, LayerPlan, Recompute, Tie
from model_providers.layout import Layout
from model_providers.losses import MaskedLoss, VocabularyShare
from model_providers.masks import MaskMaker
from model_providers.rotary import RotaryTable
from model_providers.stage_modules import Block, FinalNorm, PostNormBlock


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
    nodes: Any = None,
) -> LayerPlan:
    """As `gpt.build_plan`; ``nodes`` is for experts, which encoders do not have."""
    if model.bert is None:
        raise ModelError("family=bert: the model has no bert section; name a preset such as bert-base")
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
    if model.electra is not None:
        return build_electra_plan(building, recompute)
    config, chosen = building.config, building.kernels
    rotary = RotaryTable(model) if model.position_embedding == "rotary" else None
    masks = MaskMaker()
    kind = PostNormBlock if model.norms_after else Block
    modules: dict[str, Construct] = {"embedding": partial(EncoderEmbedding, model, config, groups, chosen)}
    for index in range(model.num_layers):
        modules[f"layers.{index}"] = partial(
            kind, config, groups, chosen, index, rotary, masks, is_causal=False
        )
    if not model.norms_after:
        modules["final_norm"] = partial(FinalNorm, config, chosen)
    modules["head"] = partial(EncoderHead, model, config, groups, chosen)
    ties = (Tie("embedding", WORD_EMBEDDINGS, "head", "weight"),) if model.tie_embeddings else ()
    return LayerPlan(
        layers=building.layers(modules, ties, checkpointable=("layers.",)),
        ties=ties,
        loss=MaskedLoss(VocabularyShare(model.known_vocab_size, model.padded_vocab_size, groups.tp)),
        inputs_type=BERTInputs,
        value_type=GPTValue,
        recompute=recompute,
        checkpoint_function=checkpoint,
    )
