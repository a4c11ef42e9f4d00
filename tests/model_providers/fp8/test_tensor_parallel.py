"""Tensor ranks scale as one process does: in fp64, where another order of sums hardly ever moves a number over a
rounding's edge (the loss is computed in fp32, and once in a while does).
"""

from typing import Any

import pytest
import torch

from model_providers.fp8.config import Fp8Config
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

# Each rank's share of every matrix is a multiple of the 128 that share a scale.
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 256, "init_std": 0.05}
MLA = {
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}
SHAPES = {
    "llama": LLAMA_LIKE | SIZES | {"num_kv_heads": 2, "qk_norm": True},
    "gpt2": GPT2_LIKE | SIZES | {"num_kv_heads": 4},
    "latent": LLAMA_LIKE | SIZES | {"num_kv_heads": None, "mla": MLA},
}


def whole(recipe: str) -> Fp8Config:
    return Fp8Config(recipe=recipe, bf16_first=0, bf16_last=0)


def on_two(facts: dict[str, Any], sequence_parallel: bool, options: dict[str, Any]) -> Any:
    return tensor_parallel_run(facts, 2, sequence_parallel, **options)


@pytest.mark.ranks
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2+sp"])
@pytest.mark.parametrize(
    "name, recipe",
    [
        ("llama", "delayed"),
        ("gpt2", "current"),
        ("llama", "blockwise"),
        ("gpt2", "mxfp8"),
        ("latent", "current"),
    ],
)
def test_two_tensor_ranks_round_as_one(ranks: Any, name: str, recipe: str, sequence_parallel: bool) -> None:
    model, options = ModelConfig(**SHAPES[name]), {"params_dtype": torch.float64, "fp8": whole(recipe)}
    loss, gradients = loss_and_gradients(build(model, **options), *batch(model))
    plain, _ = loss_and_gradients(build(model, params_dtype=torch.float64), *batch(model))
    assert abs(loss - plain) > 1e-5, "the recipe must bite in this test"
    for found_loss, _, found in ranks.run(on_two, 2, SHAPES[name], sequence_parallel, options):
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert_same_tensors(found, gradients, relative=1e-5)
