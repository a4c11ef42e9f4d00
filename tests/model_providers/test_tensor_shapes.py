"""Shapes are those of built models; what tensor ranks hold adds up to what shares count."""

import pytest

from model_providers.config import ModelConfig
from model_providers.tensor_shapes import layer_shapes
from model_providers.tensor_shares import layer_shares
from tests.model_providers.plans import build
from tests.model_providers.test_cost import MIXES, MIXES_IN_ROUTING, STACKS

MODELS = MIXES | MIXES_IN_ROUTING | STACKS


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_shapes_are_those_of_the_built_model(model: ModelConfig) -> None:
    """In order, but for latent attention, whose norms stand between its matrices."""
    built = build(model)
    seen: set[int] = set()
    for name, module, shapes in zip(built.layers, built.layers.values(), layer_shapes(model), strict=True):
        own = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        found, planned = [tuple(parameter.shape) for parameter in own], [shape.lengths for shape in shapes]
        if model.mla is not None:
            found, planned = sorted(found), sorted(planned)
        assert planned == found, name


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("tp", "ep", "etp"), [(1, 1, 1), (2, 1, 2), (2, 2, 1)])
def test_a_ranks_shapes_add_up_to_its_share(model: ModelConfig, tp: int, ep: int, etp: int) -> None:
    shares = layer_shares(model, tp=tp, ep=ep, etp=etp)
    shapes = layer_shapes(model, tp=tp, ep=ep, etp=etp)
    for share, tensors in zip(shares, shapes, strict=True):
        experts = sum(tensor.elements for tensor in tensors if tensor.is_expert)
        assert (sum(tensor.elements for tensor in tensors) - experts, experts) == (share.dense, share.experts)
