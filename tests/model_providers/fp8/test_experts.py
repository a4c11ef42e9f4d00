"""Routed experts in eight bits: each is a linear of its own, whoever holds it and however many rows it has."""

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from model_providers import weight_gradients
from model_providers.building import solo_groups
from model_providers.fp8 import copies, experts
from model_providers.fp8.config import RECIPES, Fp8Config
from model_providers.fp8.experts import Fp8ExpertLinear, Fp8ExpertProduct, filled
from model_providers.fp8.history import INPUT, AmaxHistory
from model_providers.fp8.linears import COLUMN_CUTS, Fp8Product, scalings
from model_providers.fp8.scaling import Scaling
from model_providers.fp8.tally import Tally
from tests.model_providers.plans import batch, build, llama_like, loss_and_gradients

RECIPE = pytest.mark.parametrize("recipe", RECIPES)
COUNTS = [40, 0, 7, 130]
EXPERTS, FIRST = 8, 2  # of which this rank holds those from the third on
K, N = 160, 48


def scaling_of(recipe: str, num_experts: int = EXPERTS, name: str = "layers.1.fc1", **facts: Any) -> Scaling:
    scaling = Scaling(Fp8Config(recipe=recipe, **facts), None, cut=COLUMN_CUTS, num_experts=num_experts)
    scaling.name = name
    return scaling


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, matrices and the output's gradient; experts differ in magnitude.

    In fp64, where FP8 products and their sums are exact: a product of two E4M3 values is a multiple of 2^-18 below
    2^18, so a sum of K of them takes 36 + log2(K) bits of fp64's 53 (measured over all recipes, block scales and E5M2
    gradients included: at most 40).  So results are compared bit for bit: the order of a GEMM's sums, which depends on
    its shape, the instruction set and the number of threads, does not matter.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 3.0, 50.0, 0.02]).repeat_interleave(torch.tensor(COUNTS))
    x = torch.randn(sum(COUNTS), K, generator=generator) * sizes[:, None]
    weight = (
        torch.randn(len(COUNTS), N, K, generator=generator)
        * torch.tensor([1.0, 9.0, 0.1, 4.0])[:, None, None]
    )
    grad = torch.randn(sum(COUNTS), N, generator=generator)
    return x.double().requires_grad_(), weight.double().requires_grad_(), grad.double()


def run(scaling: Scaling, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return Fp8ExpertProduct.apply(x, weight, COUNTS, scaling, FIRST, torch.is_grad_enabled())


@RECIPE
def test_each_expert_is_a_linear_of_its_own(recipe: str) -> None:
    """Over three steps, so that past scales are each expert's own too."""
    x, weight, grad = tensors()
    together = scaling_of(recipe)
    alone = [scaling_of(recipe, 1, f"layers.1.fc1.{FIRST + place}") for place in range(len(COUNTS))]
    for step in range(3):
        x.grad = weight.grad = None
        output = run(together, x, weight)
        output.backward(grad * (step + 1))
        parts = zip(x.split(COUNTS), weight, grad.split(COUNTS), alone, strict=True)
        outputs, grads_x, grads_weight = [], [], []
        for rows, matrix, gradient, scaling in parts:
            if not len(rows):
                grads_weight.append(torch.zeros(N, K, dtype=weight.dtype))
                continue
            own = [tensor.detach().clone().requires_grad_() for tensor in (rows, matrix)]
            out = Fp8Product.apply(own[0][:, None], own[1], None, False, False, None, scaling, True)
            out.backward(gradient[:, None] * (step + 1))
            outputs.append(out.detach()[:, 0])
            grads_x.append(own[0].grad)
            grads_weight.append(own[1].grad)
        assert torch.equal(output, torch.cat(outputs))
        assert torch.equal(x.grad, torch.cat(grads_x))
        assert torch.equal(weight.grad, torch.stack(grads_weight))
        for scaling in (together, *alone):
            if scaling.history is not None:
                scaling.history.roll(scaling.history.seen)


@RECIPE
def test_rows_of_zeros_that_a_device_asks_for_change_nothing(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recipe == "nvfp4":  # other rows, other draws
        pytest.skip("its gradients are rounded at random, by their places")
    x, weight, grad = tensors()
    plain = run(scaling_of(recipe), x, weight)
    plain.backward(grad)
    wanted = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    monkeypatch.setattr(experts, "filled", lambda rows, facts: F.pad(rows, (0, 0, 0, -len(rows) % 128)))
    scaling = scaling_of(recipe)
    scaling.look = tally = Tally(scaling, torch.device("cpu"))
    found = run(scaling, x, weight)
    found.backward(grad)
    assert [float(row[0]) for row in tally.sums] == [x.numel(), 2 * 3 * N * K, grad.numel()], (
        "nor are they seen"
    )
    assert torch.equal(found, plain) and torch.equal(x.grad, wanted[0])
    assert torch.equal(weight.grad, wanted[1])


def test_weight_gradients_can_wait() -> None:
    x, weight, grad = tensors()
    run(scaling_of("current"), x, weight).backward(grad)
    wanted, weight.grad = weight.grad, None
    with weight_gradients.put_aside() as store:
        run(scaling_of("current"), x, weight).backward(grad)
    assert weight.grad is None and len(store) == 1
    found: list[Any] = []
    store.compute(lambda parameter, gradient: found.append((parameter, gradient)))
    assert found[0][0] is weight and torch.equal(found[0][1], wanted)


def test_rows_are_kept_in_one_byte_a_number() -> None:
    x, weight, _ = tensors()
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(scaling_of("current"), x, weight)
    num_bytes = sum(tensor.nbytes for tensor in kept if tensor is not weight)
    assert x.numel() <= num_bytes < 1.01 * x.numel()


def test_copies_of_all_experts_last_a_step_and_not_longer() -> None:
    x, weight, _ = tensors()
    scaling, made = scaling_of("current"), []
    scaling.look = lambda operand, tensor, quantised: made.append(operand)
    copies.begin_step()
    for _ in range(2):
        run(scaling, x, weight)
    assert made.count("weight") == 3, "one for each expert that has rows"
    copies.end_step()
    copies.begin_step()
    run(scaling, x, weight)
    copies.end_step()
    assert made.count("weight") == 6


def test_an_expert_without_past_takes_what_its_neighbours_had() -> None:
    history = AmaxHistory(4, num_experts=3)
    history.note(INPUT, torch.tensor(5.0), 1)
    history.note(INPUT, torch.tensor(3.0), 2)
    assert history.magnitude(INPUT, 1) is None
    history.roll(history.seen)
    found = [float(history.magnitude(INPUT, expert)) for expert in range(3)]  # type: ignore[arg-type]
    assert found == [5.0, 5.0, 3.0]
    again = AmaxHistory(2, num_experts=3)
    again.restore(history.state(), torch.device("cpu"))
    assert [float(again.magnitude(INPUT, expert)) for expert in range(3)] == found  # type: ignore[arg-type]


@pytest.mark.parametrize(("recipe", "rows"), [("current", 16), ("mxfp8", 32), ("blockwise", 128)])
def test_rows_are_filled_up_for_a_device_alone(recipe: str, rows: int) -> None:
    facts, x = Fp8Config(recipe=recipe), torch.ones(7, 4)
    assert filled(x, facts) is x
    like_cuda = cast(Any, SimpleNamespace(size=x.size, is_cuda=True))
    with patch.object(experts.F, "pad", lambda given, by: by):
        assert cast(Any, filled(like_cuda, facts)) == (0, 0, 0, rows - 7)
    whole = cast(Any, SimpleNamespace(size=lambda _: 2 * rows, is_cuda=True))
    assert filled(whole, facts) is whole, "nothing is copied where nothing lacks"


MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32, "shared_ffn_hidden_size": 32}


def whole(**facts: Any) -> Fp8Config:
    return Fp8Config(recipe="current", bf16_first=0, bf16_last=0, **facts)


@pytest.mark.parametrize(
    ("facts", "is_taken"), [({}, True), ({"experts": True}, True), ({"experts": False}, False)]
)
def test_a_model_s_experts_follow_unless_told_not_to(facts: dict[str, Any], is_taken: bool) -> None:
    model = llama_like(moe=MOE)
    built = build(model, fp8=whole(**facts))
    loss, gradients = loss_and_gradients(built, *batch(model))
    names = [scaling.name for scaling in scalings(built.layers)]
    assert ("layers.1.mlp.experts.linear_fc2" in names) == is_taken
    assert "layers.1.mlp.shared_experts.linear_fc2" in names
    plain, exact = loss_and_gradients(build(model), *batch(model))
    assert loss == pytest.approx(plain, rel=0.02)
    for name, tensor in gradients.items():
        if ".experts." in name:
            assert 0 < (tensor - exact[name]).norm() < 0.3 * exact[name].norm(), name


def test_experts_know_their_numbers_over_all_ranks() -> None:
    class Second:
        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 1

    built = build(llama_like(moe=MOE), fp8=whole())
    config = built.plan.layers[1].build().config
    groups = solo_groups()._replace(ep=Second())
    part = type("Part", (Fp8ExpertLinear,), {"facts": whole()})(
        config, 2, 8, 16, cut=1, stride=1, groups=groups
    )
    seen: list[int] = []
    part.scaling.input = lambda rows, *, expert, **named: (
        seen.append(expert)
        or Scaling.input(  # type: ignore
            part.scaling, rows, expert=expert, **named
        )
    )
    part(torch.randn(5, 16), [2, 3])
    assert seen == [2, 3]
