"""What the router adds to megatron-core's: statistics, a bias that balances, jitter in training, a fair global loss."""

import math
from typing import Any

import pytest
import torch

from model_providers.random_streams import seed_streams
from model_providers.router import Router, RouterLoad, set_loss_scale
from tests.model_providers.plans import batch, build, llama_like, loss_and_gradients

MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16}


class Alone:
    def size(self) -> int:
        return 1


def with_router(**moe: Any) -> tuple[Any, Router]:
    seed_streams(1)
    set_loss_scale(1.0, torch.device("cpu"))
    built = build(llama_like(moe=MOE | moe, num_layers=1))
    return built, built.layers["layers/0"].mlp.router


def trained_once(**moe: Any) -> tuple[RouterLoad, Router, dict[str, torch.Tensor]]:
    built, router = with_router(**moe)
    _, gradients = loss_and_gradients(built, *batch(llama_like()))
    return router.take_load(), router, gradients


def test_the_load_counts_every_token_once_for_each_of_its_experts() -> None:
    load, router, _ = trained_once(aux_loss=0.01, z_loss=0.01)
    assert load.passes == 1 and load.tokens == 32 and load.taken.sum() == 32 * 2
    assert 0 < load.entropy / load.tokens <= math.log(4)
    assert set(load.losses) == {"aux_loss", "z_loss"} and load.losses["aux_loss"] >= 0.9
    assert router.take_load() == RouterLoad(), "a look takes what it saw"


@pytest.mark.parametrize("drop", ["probs", "position"])
def test_what_exceeds_the_capacity_is_dropped_and_told(drop: str) -> None:
    load, _, _ = trained_once(capacity_factor=0.5, drop=drop)
    assert load.taken.max() <= 8 and load.taken.sum() < 32 * 2  # half of 32 * 2 / 4


def test_padding_is_no_token() -> None:
    load, _, _ = trained_once(capacity_factor=2.0, pad_to_capacity=True)
    assert load.taken.sum() == 32 * 2


def test_an_evaluation_leaves_no_trace() -> None:
    built, router = with_router(score="sigmoid", bias_update_rate=0.1, jitter=0.5, global_aux_loss=0.1)
    built.layers.eval()
    tokens, _ = batch(llama_like())
    with torch.no_grad():
        first, second = built(tokens), built(tokens)
    assert torch.equal(first, second), "jitter is for training"
    assert router.take_load() == RouterLoad() and router.local_tokens_per_expert is None
    built.layers.train()
    with torch.no_grad():
        assert not torch.equal(built(tokens), first)


def test_experts_with_less_than_their_share_become_more_likely() -> None:
    built, router = with_router(score="sigmoid", bias_update_rate=0.25)
    loss_and_gradients(built, *batch(llama_like()))
    counts = router.local_tokens_per_expert.clone()
    router.end_step(Alone(), applied=False)
    assert torch.equal(router.expert_bias, torch.zeros(4)), "a step that was not taken changes nothing"
    loss_and_gradients(built, *batch(llama_like()))
    router.end_step(Alone(), applied=True)
    assert torch.equal(router.expert_bias, 0.25 * torch.sign(counts.mean() - counts))
    assert router.local_tokens_per_expert is None
    assert "mlp.router.expert_bias" in built.layers["layers/0"].state_dict()


def test_the_bias_balances_within_some_steps() -> None:
    """One expert is everybody's choice at first; after some steps it has about its share."""
    built, router = with_router(score="sigmoid", bias_update_rate=0.02)
    router.expert_bias[0] = 0.5
    spreads = []
    for step in range(60):
        loss_and_gradients(built, *batch(llama_like(), size=4, seed=step))
        taken = router.take_load().taken
        spreads.append((taken.max() / taken.mean()).item())
        router.end_step(Alone(), applied=True)
    assert spreads[0] == 2.0 and sum(spreads[-10:]) / 10 < 1.4


def test_recompute_counts_tokens_once() -> None:
    from model_providers.layer_plan import Recompute
    from tests.model_providers.test_recompute import Run

    model = llama_like(
        moe=MOE | {"score": "sigmoid", "bias_update_rate": 0.1, "global_aux_loss": 0.1}, num_layers=1
    )
    seed_streams(1)
    built = build(model, recompute=Recompute("full"))
    tokens, targets = batch(model)
    built.plan.loss(Run(built)(tokens), targets).backward()
    router = built.layers["layers/0"].mlp.router
    assert (
        router.take_load().tokens == 32
        and router.local_tokens_per_expert.sum() == 64
        and router.ga_steps == 1
    )


def test_the_global_loss_looks_at_all_micro_batches_so_far() -> None:
    """Two halves one after the other: the second one's frequencies are those of both."""
    model = llama_like(moe=MOE | {"global_aux_loss": 1.0}, num_layers=1)
    seed_streams(1)
    set_loss_scale(1.0, torch.device("cpu"))
    built = build(model)
    router = built.layers["layers/0"].mlp.router
    tokens, targets = batch(model, size=4)
    counts = []
    for half in (tokens[:2], tokens[2:]):
        built.plan.loss(built(half), type(targets)(half, torch.zeros(half.shape))).backward()
        counts.append(router.take_load())
    assert torch.equal(router.global_tokens_per_expert, counts[0].taken + counts[1].taken)
    assert router.ga_steps == 2
    router.end_step(Alone(), applied=True)
    assert router.global_tokens_per_expert is None and router.ga_steps == 0


@pytest.mark.parametrize("kind", ["aux_loss", "sequence_aux_loss", "global_aux_loss", "z_loss"])
def test_each_loss_reaches_the_router_and_scales_with_its_coefficient(kind: str) -> None:
    def gradient(coefficient: float) -> torch.Tensor:
        return trained_once(**{kind: coefficient})[2]["layers.0.mlp.router.weight"]

    none, some, twice = gradient(0.0), gradient(0.5), gradient(1.0)
    assert (some - none).abs().max() > 1e-4
    torch.testing.assert_close(twice - none, 2 * (some - none), rtol=1e-4, atol=1e-6)


def test_the_gate_is_computed_in_fp32_whatever_the_weights_are() -> None:
    _, router = with_router()
    router.weight.data = router.weight.data.bfloat16()
    x = torch.randn(3, 2, 32, dtype=torch.bfloat16, requires_grad=True)
    logits = router.gating(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ router.weight.float().t())
    logits.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and router.weight.grad.dtype == torch.bfloat16
