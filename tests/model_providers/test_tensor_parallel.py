"""Two tensor ranks, with and without sequence parallelism, are one model: same weights, same loss, same
gradients.
"""

from typing import Any

import pytest
import torch

from tests.model_providers.plans import (
    GPT2_LIKE,
    LLAMA_LIKE,
    ModelConfig,
    assert_same_tensors,
    batch,
    build,
    loss_and_gradients,
    tensor_parallel_run,
)

SHAPES = {
    "llama with qk-norm, tied": LLAMA_LIKE | {"qk_norm": True},
    "gpt-2": GPT2_LIKE,
    "llama, untied, qkv bias, rotary fraction": LLAMA_LIKE
    | {"tie_embeddings": False, "qkv_bias": True, "rotary_fraction": 0.5},
    "multi-query: fewer key heads than ranks": LLAMA_LIKE | {"num_kv_heads": 1, "qk_norm": True},
}


@pytest.mark.ranks
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2+sp"])
@pytest.mark.parametrize("facts", SHAPES.values(), ids=SHAPES)
def test_two_tensor_ranks_equal_one(ranks: Any, facts: dict[str, Any], sequence_parallel: bool) -> None:
    assert_ranks_equal_one(ranks, facts, 2, sequence_parallel)


@pytest.mark.ranks
def test_four_tensor_ranks_share_two_key_heads(ranks: Any) -> None:
    assert_ranks_equal_one(ranks, LLAMA_LIKE | {"qk_norm": True, "qkv_bias": True}, 4, True)


def assert_ranks_equal_one(ranks: Any, facts: dict[str, Any], tp: int, sequence_parallel: bool) -> None:
    model = ModelConfig(**facts)
    built = build(model)
    weights = {name: parameter.detach().clone() for name, parameter in built.named_parameters().items()}
    loss, gradients = loss_and_gradients(built, *batch(model))
    on_ranks = ranks.run(tensor_parallel_run, tp, facts, tp, sequence_parallel)
    for found_loss, found_weights, found_gradients in on_ranks:
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert found_weights.keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.equal(found_weights[name], weight), f"initial {name} depends on the layout"
        assert_same_tensors(found_gradients, gradients, relative=1e-5)
