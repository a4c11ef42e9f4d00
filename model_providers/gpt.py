"""GPT as a plan of layers: embedding, blocks, final norm, layers that look ahead, head."""

from functools import partial

from model_providers.building import WORD_EMBEDDINGS, Building, Construct, checkpoint
from model_providers.layer_plan import GPTInputs, GPTValue, LayerPlan, Tie
from model_providers.losses import VocabularyShare, WeightedLoss
from model_providers.masks import MaskMaker
from model_providers.moe_layer import ExpertPlace
from model_providers.rotary import RotaryTable
from model_providers.stage_modules import Block, Embedding, FinalNorm, Head, LookAhead


def plan(building: Building) -> LayerPlan:
    """The layers of `layer_plan.GPTValue`."""
    model, groups, config, chosen = building.model, building.groups, building.config, building.kernels
    rotary = RotaryTable(model) if model.position_embedding == "rotary" else None
    masks = MaskMaker(has_prefix=model.attention == "prefix")
    experts = ExpertPlace(groups, building.layout, building.nodes)

    def block(index: int, has_experts: bool) -> Block:
        placed, parts = experts if has_experts else None, building.kernels_of(index, model.num_layers)
        return Block(config, groups, parts, index, rotary, masks, placed, is_causal=model.is_causal)

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
        recompute=building.recompute,
        checkpoint_function=checkpoint,
    )
