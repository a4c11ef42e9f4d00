"""A linear in eight bits: its three products, what it keeps, copies that last a step, gradients that wait."""

from typing import Any

import pytest
import torch

from model_providers import weight_gradients
from model_providers.fp8 import copies
from model_providers.fp8.config import RECIPES, Fp8Config
from model_providers.fp8.linears import COLUMN_CUTS, Fp8Product, scalings
from model_providers.fp8.quantised import Quantised
from model_providers.fp8.scaling import Scaling
from model_providers.layer_plan import Recompute
from tests.model_providers.plans import LLAMA_LIKE, ModelConfig, batch, build, loss_and_gradients
from tests.model_providers.test_linears import accumulate

ROUGH = {"delayed": 0.06, "current": 0.06, "blockwise": 0.05, "mxfp8": 0.05, "nvfp4": 0.25}  # relative errors
RECIPE = pytest.mark.parametrize("recipe", RECIPES)


def scaling_of(recipe: str, **facts: Any) -> Scaling:
    return Scaling(Fp8Config(recipe=recipe, **facts), None, cut=COLUMN_CUTS)


def tensors(*, s: int = 20, b: int = 2, k: int = 160, n: int = 48) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((s, b, k), (n, k), (n,), (s, b, n)))


def run(scaling: Scaling, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return Fp8Product.apply(x, weight, bias, False, False, None, scaling, torch.is_grad_enabled())


@RECIPE
def test_the_three_products_are_of_the_quantised_operands(recipe: str) -> None:
    x, weight, bias, grad = tensors()
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    scaling, seen = scaling_of(recipe), {}
    scaling.look = lambda operand, tensor, quantised: seen.__setitem__(operand, quantised)
    output = run(scaling, *leaves)
    output.backward(grad)
    operands = {
        name: quantised.values(torch.float64) * quantised.unit.double() for name, quantised in seen.items()
    }
    wanted = operands["input"] @ operands["weight"].t() + bias.double()
    torch.testing.assert_close(output.flatten(0, 1).double(), wanted, rtol=1e-5, atol=1e-4)
    grad_x = operands["gradient"] @ operands["weight"]
    if recipe != "mxfp8":  # whose weights are scaled along the other axis there
        torch.testing.assert_close(leaves[0].grad.flatten(0, 1).double(), grad_x, rtol=1e-5, atol=1e-4)
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    (exact[0] @ exact[1].t() + exact[2]).backward(grad.double())
    for found, reference in zip(leaves, exact, strict=True):
        error = (found.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert error < ROUGH[recipe], error
    assert leaves[1].grad is not None and (leaves[1].grad.double() - exact[1].grad).norm() > 0


@pytest.mark.parametrize("recipe", ["current", "blockwise", "mxfp8"])
def test_the_input_is_kept_in_one_byte_a_number(recipe: str) -> None:
    x, weight, bias, _ = tensors(s=64, k=256)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(scaling_of(recipe), x, weight, bias)
    num_bytes = sum(tensor.nbytes for tensor in kept if tensor is not weight)
    assert x.numel() <= num_bytes < 1.1 * x.numel()


def test_a_copy_of_a_weight_lasts_a_step_and_not_longer() -> None:
    scaling, made = scaling_of("current"), []
    scaling.look = lambda operand, tensor, quantised: made.append(operand)
    weight = torch.randn(16, 16, requires_grad=True)
    scaling.weight(weight)
    scaling.weight(weight)
    assert len(made) == 2, "outside of a step nothing is kept: the weight may change at any time"
    copies.begin_step()
    first = scaling.weight(weight)
    assert scaling.weight(weight) is first and len(made) == 3
    copies.end_step()
    with torch.no_grad():
        weight.mul_(2)
    copies.begin_step()
    second = scaling.weight(weight)
    copies.end_step()
    assert torch.equal(second.rows.payload, first.rows.payload) and second.rows.unit == 2 * first.rows.unit


@RECIPE
def test_products_get_rows_in_memory(recipe: str) -> None:
    """Kernels for blocks take one row after the other only; transposed views are not."""
    scaling, x = scaling_of(recipe), torch.randn(256, 384)
    for sides in (
        scaling.input(x, both=True, is_trained=True),
        scaling.gradient(x, both=True),
        scaling.weight(x),
    ):
        assert sides.columns is not None and sides.columns.payload.shape == (384, 256)
        assert sides.rows.payload.is_contiguous() and sides.columns.payload.is_contiguous()


@RECIPE
def test_a_forward_pass_that_keeps_nothing_quantises_a_weight_one_way(recipe: str) -> None:
    scaling, weight = scaling_of(recipe), torch.randn(16, 64)
    alone, whole = scaling.weight(weight, both=False), scaling.weight(weight)
    assert alone.columns is None and whole.columns is not None
    assert torch.equal(alone.rows.values(torch.float32), whole.rows.values(torch.float32))
    copies.begin_step()
    assert scaling.weight(weight, both=False).columns is not None, "the step's backward passes ask for it"
    copies.end_step()


def test_a_past_scale_clips_what_grew_and_the_next_step_knows() -> None:
    scaling = scaling_of("delayed", amax_history=2)
    assert scaling.history is not None
    for size, wanted in ((1.0, 1.0), (4.0, 1.0), (1.0, 4.0), (1.0, 4.0), (1.0, 1.0)):
        x = torch.full((4, 16), size)
        quantised: Quantised = scaling.input(x, both=False, is_trained=True).rows
        assert quantised.unit * 448 / 2 <= wanted <= quantised.unit * 448, "scaled by what was known before"
        scaling.history.roll(scaling.history.seen)


def test_a_step_that_was_not_applied_does_not_count() -> None:
    scaling = scaling_of("delayed")
    assert scaling.history is not None
    scaling.input(torch.full((2, 2), torch.inf), both=False, is_trained=True)
    scaling.history.roll(None)
    assert scaling.history.num_steps == 0 and not scaling.history.seen.any()


@RECIPE
def test_gradients_that_wait_are_the_same(recipe: str) -> None:
    model = ModelConfig(**LLAMA_LIKE)
    built = build(model, fp8=Fp8Config(recipe=recipe, bf16_first=0, bf16_last=1))
    inputs, targets = batch(model)
    parameters = built.named_parameters()
    with weight_gradients.may_wait():
        loss, wanted = loss_and_gradients(built, inputs, targets)
        for parameter in parameters.values():
            parameter.grad = None
        later = built.plan.loss(built(inputs), targets)
        with weight_gradients.put_aside() as store:
            later.backward()
    assert later.item() == loss
    in_blocks = [name for name in parameters if ".linear_" in name and name.endswith("weight")]
    assert all(parameters[name].grad is None for name in in_blocks), "they must wait"
    store.compute(accumulate)
    for name, parameter in parameters.items():
        assert torch.equal(parameter.grad, wanted[name]), name


@RECIPE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_learns_what_it_would_learn_without(recipe: str, dtype: torch.dtype) -> None:
    """Its gradients point the same way, and only its inner blocks differ."""
    model = ModelConfig(**LLAMA_LIKE | {"num_layers": 3})
    plain, exact = loss_and_gradients(build(model), *batch(model))
    built = build(model, params_dtype=dtype, fp8=Fp8Config(recipe=recipe))
    assert [scaling.name for scaling in scalings(built.layers)] == [
        f"layers.1.{part}"
        for part in (
            "self_attention.linear_proj",
            "self_attention.linear_qkv",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
    ]
    loss, found = loss_and_gradients(built, *batch(model))
    assert loss == pytest.approx(plain, rel=1e-2) and loss != plain
    ours, theirs = (torch.cat([x.flatten().float() for x in parts.values()]) for parts in (found, exact))
    assert torch.cosine_similarity(ours, theirs, dim=0) > (0.95 if recipe == "nvfp4" else 0.98)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_rounds_alike(recompute: Any) -> None:
    model = ModelConfig(**LLAMA_LIKE)
    results = []
    for mode in ("none", recompute):
        fp8 = Fp8Config(recipe="delayed", bf16_first=0, bf16_last=0)
        built = build(model, fp8=fp8, recompute=Recompute(mode))
        results.append(loss_and_gradients(built, *batch(model)))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
