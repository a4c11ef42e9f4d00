"""Wide products give the same numbers but for the order of sums; gradients that wait are the same to the bit."""

from typing import Any, Literal

import pytest
import torch

from model_providers import kernels, linears, weight_gradients
from model_providers.config import ModelConfig
from model_providers.kernels import torch_kernels
from model_providers.layer_plan import Recompute
from model_providers.linears import Product, WideColumnLinear
from tests.model_providers.plans import (
    GPT2_LIKE,
    LLAMA_LIKE,
    assert_same_tensors,
    batch,
    build,
    loss_and_gradients,
    tensor_parallel_run,
)


def test_a_widened_linear_is_the_rounded_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(*shape, generator=generator).bfloat16()
        for shape in ((5, 3, 64), (32, 64), (32,), (5, 3, 32))
    )
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    output = Product.apply(*leaves, False, False, None, True)
    wanted = exact[0] @ exact[1].t() + exact[2]
    output.backward(grad)
    wanted.backward(grad.double())
    torch.testing.assert_close(output, wanted.bfloat16())
    for found, reference in zip(leaves, exact, strict=True):
        torch.testing.assert_close(found.grad, reference.grad.bfloat16())


@pytest.mark.parametrize("native", [True, False])
def test_the_processor_decides(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cpu_multiplies_bf16", lambda: native)
    assert issubclass(torch_kernels("cpu").column_linear, WideColumnLinear) is not native
    assert not issubclass(torch_kernels("cuda").column_linear, WideColumnLinear)


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({}, False),
        ({"avx512_bf16": False, "avx2": True}, False),
        ({"amx_bf16": True}, True),
        ({"sve_bf16": True}, True),
    ],
)
def test_bf16_instructions_are_looked_up(
    capabilities: dict[str, bool], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert linears.cpu_multiplies_bf16() is native


@pytest.mark.parametrize("facts", [LLAMA_LIKE, GPT2_LIKE], ids=["llama", "gpt2"])
def test_a_model_in_bf16_gives_the_same_either_way(
    facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for native in (True, False):
        monkeypatch.setattr(kernels, "cpu_multiplies_bf16", lambda native=native: native)
        model = ModelConfig(**facts)
        built = build(model, params_dtype=torch.bfloat16)
        results.append(loss_and_gradients(built, *batch(model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3)
    assert_same_tensors(results[1][1], results[0][1], relative=3e-2)


def widened_on_ranks(facts: dict[str, Any], sequence_parallel: bool) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "cpu_multiplies_bf16", lambda: False)
        return tensor_parallel_run(facts, 2, sequence_parallel, params_dtype=torch.bfloat16)


@pytest.mark.ranks
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2+sp"])
@pytest.mark.parametrize("facts", [LLAMA_LIKE, GPT2_LIKE], ids=["llama", "gpt2"])
def test_two_tensor_ranks_in_bf16_equal_one(
    ranks: Any, facts: dict[str, Any], sequence_parallel: bool
) -> None:
    model = ModelConfig(**facts)
    loss, gradients = loss_and_gradients(build(model, params_dtype=torch.bfloat16), *batch(model))
    for found_loss, _, found in ranks.run(widened_on_ranks, 2, facts, sequence_parallel):
        assert found_loss == pytest.approx(loss, rel=3e-3)
        assert_same_tensors(found, gradients, relative=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("facts", [LLAMA_LIKE, GPT2_LIKE], ids=["llama", "gpt2"])
def test_gradients_that_wait_are_the_same(
    facts: dict[str, Any], dtype: torch.dtype, recompute: Literal["none", "selective"]
) -> None:
    model = ModelConfig(**facts)
    built = build(model, params_dtype=dtype, recompute=Recompute(recompute))
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
    matrices = {name for name in parameters if ".linear_" in name and name.endswith("weight")}
    assert len(matrices) == 8 and len(store) == len(matrices) + 1, "the blocks' matrices, and the head's"
    assert all(parameters[name].grad is None for name in matrices)
    store.compute(accumulate)
    assert len(store) == 0
    for name, parameter in parameters.items():
        assert parameter.grad is not None and torch.equal(parameter.grad, wanted[name]), name


def accumulate(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
