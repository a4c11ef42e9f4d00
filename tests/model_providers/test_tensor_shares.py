"""What a tensor rank holds is what the marks on built parameters say."""

import pytest

from model_providers.config import ModelConfig
from model_providers.cost import layer_costs
from model_providers.layout import TensorPlace
from model_providers.logical import describe
from model_providers.tensor_shares import layer_shares
from tests.model_providers.plans import build, llama_like
from tests.model_providers.test_cost import MIXES, MIXES_IN_ROUTING, STACKS

MODELS = MIXES | MIXES_IN_ROUTING | STACKS


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_whole_parameters_are_those_that_no_mark_cuts(model: ModelConfig) -> None:
    """Two ranks hold what one does, and once more what is whole on each."""
    built = build(model)
    seen: set[int] = set()
    shares = layer_shares(model, tp=2, ep=1, etp=2)
    for layer, module, share in zip(built.plan.layers, built.layers.values(), shares, strict=True):
        own = {id(parameter) for parameter in module.parameters()} - seen
        seen |= own
        found = [
            described
            for (name, parameter), described in zip(
                module.named_parameters(), describe(module, TensorPlace()).values(), strict=True
            )
            if id(parameter) in own
        ]
        sizes = {True: 0, False: 0}
        for described in found:
            elements = 1
            for length in described.shape:
                elements *= length
            sizes[described.replicated] += elements
        assert share.all == sizes[True] + sizes[False] // 2, layer.name
        assert share.is_checkpointable == layer.checkpointable, layer.name
    users = {
        tie.user for tie in built.plan.ties if tie.owner == "embedding" and "word" in tie.owner_parameter
    }
    assert {
        layer.name for layer, share in zip(built.plan.layers, shares, strict=True) if share.reads_words
    } == users


def test_experts_are_shared_out_apart() -> None:
    model = llama_like(moe={"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16})
    experts = layer_costs(model, 1)[1].expert_parameters
    assert layer_shares(model, tp=2, ep=4, etp=1)[1].experts == experts // 4
    assert layer_shares(model, tp=2, ep=2, etp=2)[1].experts == experts // 4
