"""BERT as a plan of layers: embedding, blocks that see both ways, final norm where norms come first, head."""

from functools import partial

from model_providers import electra
from model_providers.building import WORD_EMBEDDINGS, Building, Construct, checkpoint
from model_providers.encoder_modules import EncoderEmbedding, EncoderHead
from model_providers.layer_plan import BERTInputs, GPTValue, LayerPlan, Tie
from model_providers.losses import MaskedLoss, VocabularyShare
from model_providers.masks import MaskMaker
from model_providers.rotary import RotaryTable
from model_providers.stage_modules import Block, FinalNorm, PostNormBlock


def plan(building: Building) -> LayerPlan:
    """An encoder that fills in, or tells replaced tokens."""
    model, groups, config, chosen = building.model, building.groups, building.config, building.kernels
    if model.electra is not None:
        return electra.plan(building)
    rotary = RotaryTable(model) if model.position_embedding == "rotary" else None
    masks = MaskMaker()
    kind = PostNormBlock if model.norms_after else Block
    modules: dict[str, Construct] = {"embedding": partial(EncoderEmbedding, model, config, groups, chosen)}
    for index in range(model.num_layers):
        modules[f"layers.{index}"] = partial(
            kind,
            config,
            groups,
            building.kernels_of(index, model.num_layers),
            index,
            rotary,
            masks,
            is_causal=False,
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
        recompute=building.recompute,
        checkpoint_function=checkpoint,
    )
