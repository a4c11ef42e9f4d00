"""T5 as a plan of layers: embedding, encoder, norm, the decoder's embedding, decoder, norm, head."""

from functools import partial

from model_providers.building import WORD_EMBEDDINGS, Building, Construct, checkpoint
from model_providers.config import ModelConfig
from model_providers.layer_plan import LayerPlan, T5Inputs, T5Value, Tie
from model_providers.losses import VocabularyShare, WeightedLoss
from model_providers.masks import MaskMaker
from model_providers.rotary import RotaryTable
from model_providers.t5_modules import SourceEmbedding, StackBlock, StackNorm, TargetEmbedding, TargetHead

RELATIVE_BIAS = "relative_bias.weight"


def plan(building: Building) -> LayerPlan:
    """Encoder and decoder."""
    model, groups, config, chosen = building.model, building.groups, building.config, building.kernels
    assert model.t5 is not None
    encoder_depth = model.t5.num_encoder_layers
    rotary = RotaryTable(model) if model.position_embedding == "rotary" else None
    masks = MaskMaker()

    def block(index: int, is_causal: bool) -> StackBlock:
        depth = model.num_layers if is_causal else encoder_depth
        parts = building.kernels_of(index, depth)
        return StackBlock(model, config, groups, parts, index, rotary, masks, is_causal=is_causal)

    modules: dict[str, Construct] = {"embedding": partial(SourceEmbedding, model, config, groups)}
    for index in range(encoder_depth):
        modules[f"encoder.{index}"] = partial(block, index, False)
    modules["encoder_norm"] = partial(StackNorm, config, chosen)
    modules["decoder_embedding"] = partial(TargetEmbedding, model, config, groups)
    for index in range(model.num_layers):
        modules[f"decoder.{index}"] = partial(block, index, True)
    modules["final_norm"] = partial(StackNorm, config, chosen)
    modules["head"] = partial(TargetHead, model, config, groups, chosen)
    ties = _ties(model)
    return LayerPlan(
        layers=building.layers(modules, ties, checkpointable=("encoder.", "decoder.")),
        ties=ties,
        loss=WeightedLoss(VocabularyShare(model.known_vocab_size, model.padded_vocab_size, groups.tp)),
        inputs_type=T5Inputs,
        value_type=T5Value,
        recompute=building.recompute,
        checkpoint_function=checkpoint,
    )


def _ties(model: ModelConfig) -> tuple[Tie, ...]:
    """One table of words for all, and of distances for each stack."""
    assert model.t5 is not None
    ties = [Tie("embedding", WORD_EMBEDDINGS, "decoder_embedding", WORD_EMBEDDINGS)]
    if model.position_embedding == "relative":
        for stack, count in (("encoder", model.t5.num_encoder_layers), ("decoder", model.num_layers)):
            ties += [
                Tie(f"{stack}.0", RELATIVE_BIAS, f"{stack}.{index}", RELATIVE_BIAS)
                for index in range(1, count)
            ]
    if model.tie_embeddings:
        ties.append(Tie("embedding", WORD_EMBEDDINGS, "head", "weight"))
    return tuple(ties)
