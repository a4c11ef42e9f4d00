"""A cache of keys and values changes the work, not the logits."""

from typing import Any

import pytest
import torch

from model_providers.errors import ModelError
from model_providers.generation import generation_cache, next_logits
from model_providers.presets import get_preset
from tests.model_providers.plans import batch, build, gpt2_like, llama_like

MODELS = {
    "rotary, grouped heads": llama_like(),
    "learned positions, biases": gpt2_like(),
    "no positions, multi-query": llama_like(position_embedding="none", num_kv_heads=1),
    "sliding window": llama_like(sliding_window=5),
    "yarn": llama_like(rope_scaling={"kind": "yarn", "factor": 4.0, "original_max_positions": 4}),
    "experts": llama_like(moe={"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16, "jitter": 0.1}),
    "latent attention, shared experts, looking ahead": get_preset("tiny-deepseek"),
}


@pytest.mark.parametrize("steps", [[16], [7, 1, 1, 1, 6], [1] * 16], ids=["prompt", "mixed", "one by one"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_cached_steps_give_the_same_logits(model: Any, steps: list[int]) -> None:
    built = build(model)
    built.layers.eval()
    tokens, _ = batch(model)
    with torch.no_grad():
        whole = built(tokens)[..., : model.vocab_size].transpose(0, 1)  # [b s v]
    cache = generation_cache(model, batch_size=2, max_length=20)
    logits = [next_logits(built.layers.values(), part, cache, model) for part in tokens.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_the_cache_says_when_it_is_full() -> None:
    model = llama_like()
    built = build(model)
    built.layers.eval()
    tokens, _ = batch(model)
    cache = generation_cache(model, batch_size=1, max_length=10)
    with pytest.raises(ModelError, match="max_length=10: the step ends at 16 tokens"):
        next_logits(built.layers.values(), tokens[:1], cache, model)
    with pytest.raises(ModelError, match="batch_size=1: got 2 sequences"):
        next_logits(built.layers.values(), tokens[:, :4], cache, model)


def test_learned_positions_end_somewhere() -> None:
    with pytest.raises(
        ModelError, match="max_length=65: the learned positions end at max_sequence_length=64"
    ):
        generation_cache(gpt2_like(), batch_size=1, max_length=65)
